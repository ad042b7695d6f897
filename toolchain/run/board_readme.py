"""README.md of a bundle: what a person at the board types, in order, what to expect, and what to do where it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def instructions(target: Mapping[str, Any], memory: Mapping[str, Any], settings: Mapping[str, Any], wheel: str) -> str:
    """The text, with this target's releases, this plan's figures and this model's limits.

    Args:
        target, memory, settings: target.json, memory.json and processor/host.json of the bundle.
        wheel: file name of the wheel in wheel/.
    """
    releases = "\n".join(
        f"* JetPack {x['jetpack']}: {'L4T ' + x['l4t'] + ', ' if x['l4t'] else ''}TensorRT {x['tensorrt']}, "
        f"CUDA {x['cuda']}"
        for x in target["software"]
    )
    peak, build, block = (_mib(memory[key]) for key in ("peak_bytes", "build_peak_bytes", "largest_block_bytes"))
    context = min(settings["decoder"]["max_context"], memory["workload"]["context_tokens"])
    return _TEXT.format(
        title=target["title"],
        name=target["name"],
        sm=target["sm"],
        releases=releases,
        peak=peak,
        build=build,
        block=block,
        what=memory["largest_block"],
        context=context,
        half=max(64, context // 2),
        images=_images(memory, settings["image"]),
        smaller="x".join(str(max(56, side * 3 // 4)) for side in _image_sides(memory, settings["image"])),
        cma=_cma_advice(target, memory["largest_block_bytes"]),
        argument=kernel_argument(target, memory["largest_block_bytes"]),
        wheel=wheel,
    )


def _images(memory: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """What becomes of images of any size, in a sentence."""
    if memory["workload"].get("image") is None:
        return "It is planned for text alone."
    if "max_tiles" in image:
        tile = image["tile"]
        return f"Images are cut into at most {image['max_tiles']} tiles of {tile}x{tile} pixels."
    width, height = _image_sides(memory, image)
    return f"Images of more than about {width}x{height} pixels are made smaller."


def _image_sides(memory: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of the largest image that reaches the model as it is: the plan's, or a square at its limit."""
    planned = tuple(memory["workload"].get("image") or (448, 448))
    limit = image.get("max_pixels", planned[0] * planned[1])
    return planned if planned[0] * planned[1] <= limit else (math.isqrt(limit), math.isqrt(limit))


def kernel_argument(target: Mapping[str, Any], block: int) -> str:
    """ "cma=500M": the contiguous pool for a block, a fourth larger than it, as far as the board can have one."""
    wanted = max(block, target["largest_block_default_bytes"])
    return f"cma={min(-(-wanted * 5 // (4 * 2**20)), target['largest_block_bytes'] // 2**20)}M"


def _cma_advice(target: Mapping[str, Any], block: int) -> str:
    default = target["largest_block_default_bytes"]
    if block <= default:
        return f"The kernel's contiguous pool of {_mib(default)} is enough as it is."
    return (
        f"The largest block is more than the kernel's contiguous pool of {_mib(default)}: do \"A larger contiguous "
        'pool" at the\nend of this page before you build.'
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


_TEXT = """\
# A vision-language model for {title}

Made by mgvq. Every file here is listed with its hash in manifest.json; the commands below check them and
change nothing here. Do not add files to this folder.

| here | what it is |
|---|---|
| `device/` | the graphs for TensorRT with the plugin, and their weights |
| `portable/` | the same graphs for onnxruntime and TensorRT for RTX, without plugin |
| `processor/` | tokenizer, chat template, sizes of images and engines |
| `plugins/`, `libraries/` | the plugin's sources; libraries of it, if any were built when the bundle was made |
| `wheel/`, `requirements-board.txt` | mgvq itself and what it needs on the board |
| `selftest.safetensors` | small cases with exact answers, which the plugin must reproduce |
| `memory.json`, `target.json`, `bitplan.json`, `reference/` | the plan, the board, the bits, the validation's figures |

## What the board needs

One of (SM {sm}):

{releases}

Memory, by the plan in memory.json (estimated, not measured): {peak} while it runs, {build} while it builds, the largest
single block {block} ({what}). Context: {context} tokens, images and answer included.
{images}

{cma}

## 1. Copy it to the board

On the machine that has this folder, in it:

    rsync -a ./ user@board:mgvq-bundle/

The rest is typed on the board:

    cd ~/mgvq-bundle

## 2. Install, once

    sudo apt install nvidia-jetpack python3-libnvinfer python3-venv cmake
    python3 -m venv --system-site-packages ~/mgvq
    ~/mgvq/bin/pip install -r requirements-board.txt
    ~/mgvq/bin/pip install --no-deps wheel/{wheel}
    ~/mgvq/bin/mgvq doctor --target {name}

`--system-site-packages` is there for TensorRT's Python module, which JetPack installs for the system. The doctor must
not say `fail`. Its warnings about torch, transformers, onnx and onnxruntime are of no concern: a board does without.

## 3. Build, once per board and JetPack

    sudo systemctl isolate multi-user.target        # stops the desktop until the next reboot: more memory
    ~/mgvq/bin/mgvq build . -o ~/engines

It checks this folder, the release, memory and the plugin, in this order, before it builds. The plugin is compiled
first (minutes) unless libraries/ has one that fits. Then one line a graph (decoder, embed, vision), and at the end a
table with the size of each engine and a column `plugins` that is not 0, and a line `compared`: how far the engines
are off from answers of the model that are stored in reference/. ~/engines then has decoder.engine, embed.engine,
vision.engine, libmgvq_plugin.so, a timing cache that makes a second build shorter, and build.json, which says what
was built from what. Engines run on the board and the TensorRT that built them, and nowhere else. A build that fails
leaves nothing behind but the plugin it compiled.

## 4. Run

    ~/mgvq/bin/mgvq run . --backend tensorrt --engines ~/engines --image IMAGE --prompt QUESTION --stream
    ~/mgvq/bin/mgvq chat . --backend tensorrt --engines ~/engines --image IMAGE
    ~/mgvq/bin/mgvq profile . --backend tensorrt --engines ~/engines -o ~/profile

The last one writes ~/profile/profile.html: where the time goes, by phase and by module.

## Where it stops

`echo $?` after a command is its exit code. The line that begins with `error:` says what was expected, what was found
and what to do.

| exit code | it means | do |
|---|---|---|
| 0 | done | |
| 1 | a fault of mgvq | report it with all the lines it printed |
| 2 | the command is wrong | correct what the message names; `mgvq build --help` |
| 3 | a backend or board that mgvq does not know | see `mgvq targets` |
| 4 | the plugin or an engine does not compute what it should | build without `--plugin`; if it stays, report it with \
build.json of a build with `--no-check` |
| 5 | it does not fit memory | the next two sections |
| 6 | JetPack, TensorRT, CUDA, the GPU, a compiler or a package is missing or another | what it names; `mgvq doctor` |
| 7 | a file is missing, or is not what it was; an image cannot be used | copy the folder again; give another image |
| 130 | stopped by Ctrl-C | start it again |

## When memory is refused (exit code 5)

In this order, after each of them build again:

1. Stop the desktop and other programs: `sudo systemctl isolate multi-user.target`; `free -m` shows what is available.
2. If the builder itself ran low: `~/mgvq/bin/mgvq build . -o ~/engines --level 1`. It takes less memory and time, and
   the engines may be slower.
3. Make the bundle again on the workstation for smaller images or a shorter context:
   `mgvq all … --target {name} --set plan.image={smaller} --set plan.context={half}`.
   `mgvq plan -m MODEL --target {name}` says beforehand what fits.
4. `--ignore-memory` builds against the plan, which is an estimate. The build is still stopped before memory runs out.

When `run` or `chat` refuse a question with exit code 5, it is longer than the context: a shorter question, fewer or
smaller images, a lower `--max-new-tokens`, or `/reset` in chat.

## A larger contiguous pool (when the largest block is refused)

    sudo cp /boot/extlinux/extlinux.conf /boot/extlinux/extlinux.conf.before
    sudo sed -i '/^ *APPEND/ s/$/ {argument}/' /boot/extlinux/extlinux.conf
    sudo reboot
    grep Cma /proc/meminfo                          # CmaTotal must have grown

If the pool is large enough and not free, reboot and build first of all.
"""
