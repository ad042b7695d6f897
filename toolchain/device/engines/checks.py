"""May this bundle be built here: release, compute capability and memory against what the bundle was made for.

A refusal says what is needed, what was found and what to do. Nothing here starts a builder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.bundle.manifest import Bundle
from toolchain.bundle.requirements import version_key
from toolchain.device.runtime.board import Board, Memory
from toolchain.errors import BudgetError, EnvironmentMismatch, InputDataError

MIB = 2**20
# Below this a Jetson's kernel begins to kill processes or stops answering; chosen, not measured.
FLOOR_BYTES = 256 * MIB


def check_release(target: Mapping[str, Any] | None, board: Board, tensorrt: str) -> list[str]:
    """Refuse a board whose JetPack, TensorRT, CUDA or compute capability is not the target's; warnings otherwise.

    TensorRT must agree in major and minor version with one of the target's releases, CUDA in its major version, L4T in
    its major version and be no older: plugins and engines break across the first two, drivers across the third.

    Args:
        target: the manifest's; None says so in a warning.

    Raises:
        EnvironmentMismatch: one of them does not agree.
    """
    if target is None:
        return ["the bundle names no target: the release of this machine was not checked"]
    needed = " or ".join(_release_text(entry) for entry in target["software"])
    where = f"{target['title']} needs {needed} and SM {target['sm']}; found {board.text(tensorrt)}"
    if board.l4t is None:
        raise EnvironmentMismatch(
            f"{where}; this is no Jetson: build on the board, or use --backend tensorrt_rtx on a workstation"
        )
    if board.gpu is None:
        raise EnvironmentMismatch(f"{where}; CUDA's driver finds no GPU: check the installation (mgvq doctor)")
    if board.gpu.sm != target["sm"]:
        raise EnvironmentMismatch(
            f"{where}; the compute capability differs: make a bundle for this board (mgvq targets, mgvq all --target)"
        )
    wrong = [_disagreements(entry, board, tensorrt) for entry in target["software"]]
    if all(wrong):
        raise EnvironmentMismatch(
            f"{where}; {min(wrong, key=len)[0]}: install a JetPack that is listed, or make the bundle with an mgvq "
            "that knows this one"
        )
    return []


def check_memory(
    plan: Mapping[str, Any] | None, memory: Memory | None, *, has_cma: bool, has_check: bool = False
) -> list[str]:
    """Refuse a build that the memory plan says will not fit what is free now; warnings otherwise.

    Args:
        plan: memory.json of the bundle; None says so in a warning.
        memory: what is free; None (no /proc/meminfo) says so in a warning.
        has_cma: whether large blocks come from the kernel's contiguous pool, as on a Jetson.
        has_check: whether the engines are run once they are built, which takes their weights too.

    Raises:
        BudgetError: the build's peak or the largest block is more; it says what to turn down.
    """
    if plan is None or memory is None:
        missing = "the bundle has no memory plan" if plan is None else "this system does not say what memory is free"
        return [f"{missing}: whether the build fits was not checked"]
    peak, block = plan["build_peak_bytes"], plan["largest_block_bytes"]
    takes = f"building takes about {_mib(peak)}"
    if has_check and plan.get("peak_bytes", 0) > peak:
        peak = plan["peak_bytes"]
        takes = f"comparing the engines with the model's answers takes about {_mib(peak)} (--no-check leaves it out)"
    if peak > memory.available_bytes:
        raise BudgetError(
            f"{takes}, {_mib(memory.available_bytes)} are available; stop the desktop (sudo systemctl isolate "
            "multi-user.target), close other programs, or make the bundle again with a smaller plan.image or "
            "plan.context"
        )
    if not has_cma or memory.cma_total_bytes is None:
        return []
    what = f"{plan['largest_block']}: one block of {_mib(block)}"
    if block > memory.cma_total_bytes:
        megabytes = -(-block * 5 // (4 * MIB))
        raise BudgetError(
            f"{what} is wanted, the kernel's contiguous pool is {_mib(memory.cma_total_bytes)}; add "
            f"cma={megabytes}M to APPEND in /boot/extlinux/extlinux.conf and reboot (950M is about the most), or make "
            "the bundle again with a smaller plan.image"
        )
    free = memory.cma_free_bytes
    if free is not None and block > free:
        raise BudgetError(
            f"{what} is wanted, {_mib(free)} of the kernel's contiguous pool of {_mib(memory.cma_total_bytes)} are "
            "free; stop the desktop (sudo systemctl isolate multi-user.target), or reboot and build first of all"
        )
    return []


def read_plan(bundle: Bundle) -> dict[str, Any] | None:
    """memory.json of a bundle, None where it has none."""
    return bundle.read_json("memory.json") if "memory.json" in bundle.files else None


def vq_nodes(bundle: Bundle) -> dict[str, int] | None:
    """Graph → how many nodes of ours its device form has, by the rewrite's own report; None without one.

    Raises:
        InputDataError: the report is not one.
    """
    name = "device/rewrite.json"
    if name not in bundle.files:
        return None
    try:
        graphs: Sequence[Mapping[str, Any]] = bundle.read_json(name)["graphs"]
        return {graph["name"]: int(graph["vq_nodes"]) for graph in graphs}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputDataError(
            f"bundle file {name}: expected name and vq_nodes of every graph ({error!r}); make the bundle again"
        ) from None


def inspection_warnings(graph: str, plugins: Sequence[str], information: str) -> list[str]:
    """What is worth a word in the inspector's text about an engine with these plugin layers; none of it is an error.

    From SM 100 on TensorRT may take plugins into larger layers. A weight that it copies into another format before a
    plugin reads it would cost its bytes on every call; the plugins take the format of inputs, so none should be.
    """
    found = []
    if unnamed := [layer for layer in plugins if layer not in information]:
        found.append(
            f"graph {graph}: the engine names {len(plugins) - len(unnamed)} of {len(plugins)} plugin layers, not "
            f"{unnamed[0]}: TensorRT made them part of others; a profile shows them there"
        )
    copies = re.findall(r"Reformatting CopyNode for (?:Network )?Input[^\"]*", information)
    if of_plugins := [each for each in copies if any(layer in each for layer in plugins)]:
        found.append(
            f"graph {graph}: TensorRT copies {len(of_plugins)} inputs of plugins into another format on every call, "
            f"the first {of_plugins[0]!r}; report it with build.json"
        )
    return found


def _release_text(entry: Mapping[str, str]) -> str:
    l4t = f"L4T {entry['l4t']}, " if entry["l4t"] else ""
    return f"JetPack {entry['jetpack']} ({l4t}TensorRT {entry['tensorrt']}, CUDA {entry['cuda']})"


def _disagreements(entry: Mapping[str, str], board: Board, tensorrt: str) -> list[str]:
    """What of one release a board does not have, in words; empty where it has all."""
    found = []
    if version_key(tensorrt)[:2] != version_key(entry["tensorrt"])[:2]:
        found.append(f"TensorRT {tensorrt} is not {entry['tensorrt']}")
    if board.cuda is None or version_key(board.cuda)[:1] != version_key(entry["cuda"])[:1]:
        found.append(f"CUDA {board.cuda or '(none)'} is not {entry['cuda']}")
    wanted, has = version_key(entry["l4t"]), version_key(board.l4t or "")
    if wanted and (has[:1] != wanted[:1] or has < wanted):
        found.append(f"L4T {board.l4t} is not {entry['l4t']} or newer")
    return found


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
