"""Verbs on a bundle: build engines, run it on a picture."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.app import app
from toolchain.cli.common import Format, FormatOption, Progress, Provider, ProviderOption, emit, size, table
from toolchain.errors import UsageError

BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder, as mgvq bundle or mgvq all writes it.")]


@app.command()
def build(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for NAME.engine and build.json.")],
    backend: Annotated[str, typer.Option(help="tensorrt (on the board) or tensorrt_rtx (anywhere).")] = "tensorrt",
    sm: Annotated[
        str | None, typer.Option(help="Compute capability for tensorrt_rtx, such as 86 (the default).")
    ] = None,
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense",
            help="Build dense twins too, to compare sizes; tensorrt_rtx only, on by default there.",
        ),
    ] = None,
    plugin: Annotated[Path | None, typer.Option(help="The plugin library, for tensorrt.")] = None,
    form: FormatOption = Format.text,
) -> None:
    """Build engines from a bundle's graphs. Exit 6 when the builder is not here."""
    import tempfile

    from toolchain.bundle import open_bundle
    from toolchain.device.engine import build_engines, load_backend

    if dense and backend != "tensorrt_rtx":
        raise UsageError("--dense has no effect with --backend tensorrt; leave it out")
    load_backend(backend)
    opened = open_bundle(bundle)
    progress = Progress()
    progress.stage(f"build      {bundle} with {backend}")
    with tempfile.TemporaryDirectory(prefix="mgvq-dense-") as scratch:
        twins = _dense_twins(opened, Path(scratch)) if backend == "tensorrt_rtx" and dense is not False else None
        report = build_engines(
            opened, output, backend, sm=sm, dense=twins, plugin_library=plugin,
            progress=lambda graph, phase, done, total: progress.step(done, total, f"{graph}: {phase}"),
        )  # fmt: skip
    rows = [
        {"graph": e.graph, "engine": size(e.bytes), "dense": size(e.dense_bytes) if e.dense_bytes else "not built",
         "ratio": f"{e.bytes / e.dense_bytes:.2f}" if e.dense_bytes else "", "layers": e.layers,
         "seconds": f"{e.seconds:.1f}"}
        for e in report.engines
    ]  # fmt: skip
    head = f"{report.backend} {report.builder_version}, SM {report.sm}\n"
    emit(report.to_json(), head + table(rows, ["graph", "engine", "dense", "ratio", "layers", "seconds"]), form)


def _dense_twins(opened, folder: Path) -> dict[str, Path]:
    from toolchain.graph.dense import dense_graph

    names = opened.names_under("portable", ".onnx")
    return {Path(name).stem: dense_graph(opened.path(name), folder / Path(name).name) for name in names}


@app.command()
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[Path | None, typer.Option(help="The picture it is about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    provider: ProviderOption = Provider.cpu,
    form: FormatOption = Format.text,
) -> None:
    """Answer a question about a picture with a bundle's portable graphs in onnxruntime."""
    from toolchain.bundle import open_bundle
    from toolchain.device.answer import greedy
    from toolchain.device.families import host_from_folder
    from toolchain.device.families.base import open_image
    from toolchain.device.ort import ort_graphs

    opened = open_bundle(bundle)
    host = host_from_folder(opened.folder / "processor")
    picture = open_image(image) if image else None
    graphs = ort_graphs(opened.folder / "portable", provider.value)
    began = time.perf_counter()
    ids = greedy(host, graphs, [host.prepare(picture, prompt)], max_new_tokens)[0]
    seconds = time.perf_counter() - began
    answer = host.decode(ids)
    data = {"answer": answer, "tokens": len(ids), "stopped": ids[-1] in host.stop_ids, "seconds": round(seconds, 3)}
    emit(data | {"backend": "onnxruntime", "provider": provider.value}, answer, form)
    if not data["stopped"]:
        print(f"the answer was cut at {max_new_tokens} tokens; raise --max-new-tokens", file=sys.stderr)
