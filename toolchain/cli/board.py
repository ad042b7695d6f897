"""Verbs on a bundle: build engines, ask one question, hold a conversation; the same on a board and off it."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolchain.cli.common import (
    EnginesOption,
    Format,
    FormatOption,
    Provider,
    ProviderOption,
    TerminalProgress,
    check_engine_flags,
    emit,
    size,
    table,
)
from toolchain.cli.remote import HostOption, PythonOption, RemoteFlags, RemoteMgvqOption, SshConfigOption, run_there
from toolchain.errors import EnvironmentMismatch, MgvqError, UsageError
from toolchain.values import Progress

if TYPE_CHECKING:
    from toolchain.device.generation.chat import Conversation, Reply
    from toolchain.device.generation.sampling import Sampler


class Answering(str, Enum):
    ort = "ort"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class Building(str, Enum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder, as mgvq bundle or mgvq all writes it.")]
AnsweringOption = Annotated[
    Answering, typer.Option("--backend", help="ort (onnxruntime, anywhere), or engines that mgvq build made.")
]
ImageOption = Annotated[
    list[Path] | None, typer.Option("--image", help="Image that the question is about. Repeatable.")
]
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most probable token.")]
TopKOption = Annotated[int, typer.Option(help="Sample from the K most probable tokens; 0 for all.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this total probability.")]
SeedOption = Annotated[int, typer.Option(help="Random seed of sampling.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Maximum tokens of the answer.")]


def build(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for NAME.engine and build.json.")],
    builder: Annotated[
        Building, typer.Option("--backend", help="tensorrt (on the board) or tensorrt_rtx (anywhere).")
    ] = Building.tensorrt,
    sm: Annotated[
        str | None, typer.Option(help="Compute capability for tensorrt_rtx, such as 86 (the default).")
    ] = None,
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense",
            help="Also build dense variants to compare sizes; tensorrt_rtx only. Default: on where onnx is there.",
        ),
    ] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Plugin library for tensorrt. Default: the bundle's, else compiled here.")
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Optimization level of the builder; lower needs less memory.")
    ] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Build even if the memory plan says that it does not fit.")
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Keep engines without comparing them with the stored answers of the model."),
    ] = False,
    host: HostOption = None,
    python: PythonOption = None,
    remote_mgvq: RemoteMgvqOption = None,
    ssh_config: SshConfigOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Build TensorRT engines from a bundle, here or on a board over ssh.

    Exit code 6 if this is not the board the bundle is for, or its builder is not installed. Example, on a workstation:
    mgvq build BUNDLE --host user@board -o ENGINES
    """
    from toolchain.bundle.manifest import open_bundle
    from toolchain.device.engines.build import BuildOptions, build_engines, check_arguments
    from toolchain.device.runtime.loaded_engines import read_build

    backend = builder.value
    if dense is not None and backend != "tensorrt_rtx":
        raise UsageError(f"--{'' if dense else 'no-'}dense has no effect with --backend {backend}; leave it out")
    check_arguments(output, backend, BuildOptions(sm, plugin, level, check=not no_check))
    remote = RemoteFlags(python, remote_mgvq, ssh_config)
    if host is not None:
        # Twins need onnx, which a board does without: they are built there only if asked for.
        twins = {True: {"--dense": True}, False: {"--no-dense": True}, None: {}}[dense]
        twins = twins or ({"--no-dense": True} if backend == "tensorrt_rtx" else {})
        flags = {"--backend": backend, "--sm": sm, "--level": level, "--ignore-memory": ignore_memory, **twins}
        flags |= {"--no-check": no_check}
        run_there(host, "build", bundle, output, flags, {"--plugin": plugin}, remote)
        next_ = f"mgvq profile {bundle} --host {host} --backend {backend} --engines {output} -o PROFILE"
        _emit_build(read_build(output), output, next_, form)
        return
    remote.refuse_idle()
    opened = open_bundle(bundle)
    progress = TerminalProgress()
    progress.stage(f"build      {bundle} with {backend}")
    with _dense_twins(opened, _wants_twins(backend, dense, progress)) as twins:
        report = build_engines(
            opened, output, backend, BuildOptions(sm, plugin, level, ignore_memory, not no_check, twins),
            progress=progress,
        )  # fmt: skip
    next_ = f"mgvq run {bundle} --backend {backend} --engines {output} --prompt QUESTION --image IMAGE"
    _emit_build(report.to_json(), output, next_, form)


CHECK_TEXT = "compared {calls} calls with {against}: worst {worst}, {relative_error:.1e} of {allowed:.1e} allowed"
MOST_WARNINGS = 5  # shown; a builder may have one for every layer


def _emit_build(record: dict[str, Any], output: Path, next_: str, form: Format) -> None:
    emit(record, f"{_build_text(record)}\nengines  {output}\nnext     {next_}", form)


def _build_text(record: Mapping[str, Any]) -> str:
    """build.json for people."""
    rows = [
        {"graph": e["graph"], "engine": size(e["bytes"]),
         "dense": size(e["dense_bytes"]) if e["dense_bytes"] else "not built",
         "ratio": f"{e['bytes'] / e['dense_bytes']:.2f}" if e["dense_bytes"] else "", "layers": e["layers"],
         "plugins": e["plugin_layers"], "seconds": f"{e['seconds']:.1f}"}
        for e in record["engines"]
    ]  # fmt: skip
    head = f"{record['backend']} {record['builder_version']}, SM {record['sm']}\n"
    check = "\n" + CHECK_TEXT.format(**record["check"]) if record.get("check") else ""
    warnings = "".join(f"\nwarning: {text}" for text in record["warnings"][:MOST_WARNINGS])
    if (more := len(record["warnings"]) - MOST_WARNINGS) > 0:
        warnings += f"\n{more} more warnings of the builder are in build.json"
    return head + table(rows, ["graph", "engine", "dense", "ratio", "layers", "plugins", "seconds"]) + check + warnings


def _wants_twins(backend: str, dense: bool | None, progress: Progress) -> bool:
    """Whether dense twins are built: they are made with onnx, which a board does without.

    Raises:
        EnvironmentMismatch: they were asked for, and onnx is not here.
    """
    if backend != "tensorrt_rtx" or dense is False:
        return False
    if importlib.util.find_spec("onnx") is not None:
        return True
    if dense:
        raise EnvironmentMismatch("--dense needs the Python module onnx, found none; pip install onnx, or leave it out")
    progress.stage(
        "  no dense twins to compare sizes with: they are made with the Python module onnx, which is not here"
    )
    return False


@contextmanager
def _dense_twins(opened, wanted: bool):
    """Graph → dense twin, in a folder that goes afterwards; empty where none is wanted."""
    import tempfile

    if not wanted:
        yield {}
        return
    from toolchain.graph.dense import dense_graph

    names = opened.names_under("portable", ".onnx")
    with tempfile.TemporaryDirectory(prefix="mgvq-dense-") as scratch:
        yield {Path(name).stem: dense_graph(opened.path(name), Path(scratch) / Path(name).name) for name in names}


def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: ImageOption = None,
    max_new_tokens: NewTokensOption = 64,
    backend: AnsweringOption = Answering.ort,
    engines: EnginesOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")] = False,
    provider: ProviderOption = Provider.cpu,
    form: FormatOption = Format.text,
) -> None:
    """Answer one question about images, from a bundle in onnxruntime or from built engines."""
    if stream and form is Format.json:
        raise UsageError("--stream has no effect with --format json; leave one of them out")
    sampler = _sampler(temperature, top_k, top_p, seed)
    images = _images(image or [])
    conversation = _conversation(bundle, backend, engines, provider)
    reply = conversation.ask(prompt, images, sampler, max_new_tokens, _printer if stream else None)
    data = {"answer": reply.text, "tokens": len(reply.ids), "stopped": reply.stopped}
    data |= {"seconds": round(reply.seconds, 3), **_facts(reply, backend, provider)}
    emit(data, "" if stream else reply.text, form)
    _say_if_cut(reply, max_new_tokens)


def chat(
    bundle: BundleArgument,
    image: ImageOption = None,
    max_new_tokens: NewTokensOption = 256,
    backend: AnsweringOption = Answering.ort,
    engines: EnginesOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="Print answers as they are generated. Default: on, unless --format json."
        ),
    ] = None,
    provider: ProviderOption = Provider.cpu,
    form: FormatOption = Format.text,
) -> None:
    """Chat about images. A line is a question; /image PATH adds an image to the next one; also /reset, /help, /exit."""
    if stream is not None and form is Format.json:
        raise UsageError(f"--{'' if stream else 'no-'}stream has no effect with --format json; leave one of them out")
    sampler = _sampler(temperature, top_k, top_p, seed)
    images = _images(image or [])
    conversation = _conversation(bundle, backend, engines, provider)
    streamed = form is Format.text and stream is not False

    def answer(text: str, about: list) -> None:
        reply = conversation.ask(text, about, sampler, max_new_tokens, _printer if streamed else None)
        data = {"answer": reply.text, "tokens": len(reply.ids), "stopped": reply.stopped}
        emit(data | _facts(reply, backend, provider), "" if streamed else reply.text, form)
        print(
            f"  {reply.prompt_tokens} tokens of prompt, {reply.reused_tokens} held already; first token after "
            f"{reply.first_token_seconds:.2f} s, {len(reply.ids)} in {reply.seconds:.2f} s",
            file=sys.stderr,
        )
        _say_if_cut(reply, max_new_tokens)

    _converse(conversation, answer, images)


HELP = "/image PATH adds an image to the next question; /reset starts over; /exit or end of input leaves"


def _converse(conversation: Conversation, answer: Callable[[str, list], None], images: list) -> None:
    """Read lines until the end. On a terminal a refusal is printed and the conversation goes on; else it ends it."""
    waiting, live = list(images), sys.stdin.isatty()
    if live:
        print(HELP, file=sys.stderr)
    while True:
        print("> " if live else "", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/exit":
                return
            if word == "/help":
                print(HELP, file=sys.stderr)
            elif word == "/reset":
                conversation.reset()
                waiting = []
            elif word == "/image":
                waiting += _images([Path(path) for path in shlex.split(rest)])
            elif word.startswith("/"):
                raise UsageError(f"{word} is no command here; {HELP}")
            elif word:
                answer(line.strip(), waiting)
                waiting = []
        except MgvqError as error:
            if not live:
                raise
            print(f"error: {error}", file=sys.stderr)


def _conversation(bundle: Path, backend: Answering, engines: Path | None, provider: Provider) -> Conversation:
    """A conversation with a bundle on a backend; flags that have no effect there are refused."""
    from toolchain.bundle.manifest import open_bundle
    from toolchain.device.families import host_from_folder
    from toolchain.device.generation.chat import Conversation
    from toolchain.device.generation.engine_graphs import open_runner
    from toolchain.device.generation.generate import GraphRunner, Runner
    from toolchain.device.generation.limits import limits_from_bundle
    from toolchain.device.generation.ort_graphs import ort_graphs

    check_engine_flags(backend.value, engines, provider)
    opened = open_bundle(bundle)
    host = host_from_folder(opened.folder / "processor")
    limits = limits_from_bundle(opened, host.settings)
    runner: Runner
    if engines is None:
        graphs = ort_graphs(opened.folder / "portable", provider.value)
        runner = GraphRunner(graphs, host.settings["decoder"], host.axes, limits.context_tokens)
    else:
        runner = open_runner(opened, engines, backend.value, host, limits.context_tokens)
    return Conversation(host, runner, limits)


def _sampler(temperature: float, top_k: int, top_p: float, seed: int) -> Sampler:
    from toolchain.device.generation.sampling import Sampler, SamplingPlan

    return Sampler(SamplingPlan(temperature, top_k, top_p, seed))


def _images(paths: list[Path]) -> list:
    from toolchain.device.families.base import open_image

    return [(f"image {path}", open_image(path)) for path in paths]


def _facts(reply: Reply, backend: Answering, provider: Provider) -> dict[str, Any]:
    """What JSON says of an answer besides itself; the names that tools rely on since the first version among them."""
    facts = {"backend": "onnxruntime" if backend is Answering.ort else backend.value}
    facts |= {"provider": provider.value} if backend is Answering.ort else {}
    counts = {key: value for key, value in asdict(reply).items() if key.endswith(("_tokens", "_seconds"))}
    return facts | counts


def _printer(piece: str) -> None:
    print(piece, end="", flush=True)


def _say_if_cut(reply: Reply, limit: int) -> None:
    if not reply.stopped:
        print(f"the answer was cut at {limit} tokens; raise --max-new-tokens", file=sys.stderr)
