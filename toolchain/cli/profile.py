"""The verb that measures: profile, here or on a board."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolchain.cli.common import (
    EnginesOption,
    Format,
    FormatOption,
    OutputOption,
    Provider,
    ProviderOption,
    TerminalProgress,
    check_engine_flags,
    emit,
)
from toolchain.cli.remote import HostOption, PythonOption, RemoteFlags, RemoteMgvqOption, SshConfigOption, run_there
from toolchain.errors import EnvironmentMismatch, InputDataError

if TYPE_CHECKING:
    from toolchain.device.families.base import Host
    from toolchain.device.profile.measure import ProfileBackend, Question, Settings
    from toolchain.device.profile.result import Prediction, Source


class ProfileBackendName(str, Enum):
    ort = "ort"
    torch = "torch"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


DEFAULT_PROMPT = "Describe the image."


def profile(
    source: Annotated[Path, typer.Argument(help="A bundle; with --backend torch a checkpoint folder.")],
    output: OutputOption,
    backend: Annotated[ProfileBackendName, typer.Option(help="What runs it.")] = ProfileBackendName.ort,
    engines: EnginesOption = None,
    image: Annotated[Path | None, typer.Option(help="Image to ask about. Default: noise of the planned size.")] = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = DEFAULT_PROMPT,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measured answers.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Number of unmeasured answers before them.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per answer; stop tokens do not end it.")] = 32,
    provider: ProviderOption = Provider.cpu,
    host: HostOption = None,
    python: PythonOption = None,
    remote_mgvq: RemoteMgvqOption = None,
    ssh_config: SshConfigOption = None,
    form: FormatOption = Format.text,
) -> None:
    """Measure the latency of each phase of an answer, by module: profile.json and profile.html."""
    from toolchain.device.profile.measure import Settings
    from toolchain.files.folders import check_output, read_json

    settings = Settings(repeats, warmup, tokens)
    remote = RemoteFlags(python, remote_mgvq, ssh_config)
    check_engine_flags(backend.value, engines, provider)
    if host is None:
        remote.refuse_idle()
    check_output(output)
    if host is not None:
        flags = {"--backend": backend.value, "--prompt": prompt, "--repeats": repeats, "--warmup": warmup,
                 "--tokens": tokens, "--provider": provider.value}  # fmt: skip
        run_there(host, "profile", source, output, flags, {"--image": image, "--engines": engines}, remote)
        data = read_json(output / "profile.json")
    else:
        data = _profile_here(_opened(source, backend, engines, provider, image, prompt, tokens), settings, output)
    from toolchain.device.profile.result import profile_text

    emit(data, f"{profile_text(data)}\n{output / 'profile.html'}" if form is Format.text else "", form)


@dataclass(frozen=True)
class Opened:
    """What is about to be profiled."""

    backend: ProfileBackend
    host: Host
    question: Question
    source: Source
    prediction: Prediction | None = None


def _opened(
    source: Path,
    backend: ProfileBackendName,
    engines: Path | None,
    provider: Provider,
    image: Path | None,
    prompt: str,
    tokens: int,
) -> Opened:
    """What the flags name; what is not there is refused before anything runs."""
    from toolchain.device.families.base import open_image
    from toolchain.device.profile.measure import Question
    from toolchain.device.profile.source import check_question, noise_image, prediction_for, source_of

    if not source.is_dir():
        raise InputDataError(f"{source} does not exist or is no folder; expected a bundle, or a checkpoint for torch")
    given = open_image(image) if image else None
    if backend is ProfileBackendName.torch:
        model = _torch(source, provider)
        asked = Question(prompt, given or noise_image(model.host.settings, None))
        return Opened(model, model.host, asked, source_of(source, None))
    from toolchain.bundle.manifest import open_bundle
    from toolchain.device.families import host_from_folder

    bundle = open_bundle(source)
    host = host_from_folder(bundle.folder / "processor")
    asked = Question(prompt, given or noise_image(host.settings, bundle))
    check_question(bundle, host, asked, tokens)
    if backend is ProfileBackendName.ort:
        opened: Any = _onnxruntime(bundle.folder / "portable", host, provider)
    else:
        from toolchain.device.profile.tensorrt import EngineBackend

        opened = EngineBackend(bundle, engines or source, backend.value, host)
    prediction = prediction_for(bundle, host, asked, backend.value, tokens)
    return Opened(opened, host, asked, source_of(source, bundle), prediction)


def _onnxruntime(folder: Path, host: Any, provider: Provider) -> Any:
    try:
        from toolchain.bench.profile_onnx import named_calls
    except ModuleNotFoundError as error:
        raise EnvironmentMismatch(
            f"--backend ort tells layers apart with the Python module {error.name}, found none; pip install onnx"
        ) from None
    from toolchain.device.profile.ort import OrtBackend

    return OrtBackend(folder, host, provider.value, named_calls)


def _torch(folder: Path, provider: Provider) -> Any:
    try:
        from toolchain.bench.profile_torch import TorchBackend
    except ModuleNotFoundError as error:
        raise EnvironmentMismatch(
            f"--backend torch needs the Python module {error.name}, found none; run it on the workstation"
        ) from None
    return TorchBackend(folder, provider.value)


def _profile_here(opened: Opened, settings: Settings, output: Path) -> dict[str, Any]:
    """Measure with the machine watched, and write the folder."""
    from toolchain.device.profile.measure import measure
    from toolchain.device.profile.result import profile_json
    from toolchain.device.profile.telemetry_sampler import Sampler
    from toolchain.files.folders import staged_folder, write_json
    from toolchain.report.profile import write_profile

    backend, prediction, progress = opened.backend, opened.prediction, TerminalProgress()
    progress.stage(f"profile    {opened.source.name} with {backend.name}")
    with Sampler(uses_gpu=backend.uses_gpu) as sampler:
        measured = measure(backend, opened.host, opened.question, settings, progress)
    seen = sampler.telemetry()
    same = prediction is not None and prediction.same_device
    wanted = prediction.plan.power_mode if prediction is not None and same else None
    data = profile_json(
        measured,
        opened.question,
        source=opened.source,
        backend=backend.name,
        runtime=backend.describe(),
        prediction=prediction,
        telemetry=seen.to_json(wanted),
    )
    with staged_folder(output) as folder:
        write_json(folder / "profile.json", data)
        write_profile(data, folder / "profile.html")
    progress.done(f"{measured.first_token.median:.1f} ms to the first token, {measured.tokens_per_s:.1f} tokens/s")
    return data
