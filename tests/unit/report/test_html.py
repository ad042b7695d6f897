"""The report: one file without outside references, only what there is, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from published_models import bit_plan, qwen2_vl_2b

from toolchain.errors import InputDataError, UsageError
from toolchain.plan.advice import advise
from toolchain.plan.latency import plan_latency
from toolchain.plan.memory import Workload, plan_memory
from toolchain.plan.target import load_target
from toolchain.report import render_report, write_report
from toolchain.report.html import SECTIONS, bars, ms_text, number_text, size_text


@pytest.fixture
def data(tmp_path):
    """Every section, with real plans and a real image."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "q.png")
    geometry, target = qwen2_vl_2b(), load_target("orin-nano-8gb")
    plan, work = bit_plan(geometry), Workload(2048, (448, 448), target.max_image_pixels)
    memory = plan_memory(plan, geometry, target, work)
    return {
        "title": "demo <run>",
        "headline": {"accuracy": {"fp": 0.991, "rtn": 0.61, "mgvq": 0.97}, "samples": 200, "bits": {"model": 2.61}},
        "parts": [{"part": "language", "index_bits": 2.0, "real_bits": 2.03, "bytes": 123456, "bytes_fp16": 10**6}],
        "layers": [
            {"name": f"model.language_model.layers.{i}.mlp.down_proj", "part": "language", "code": "4,8,8", "bits": 2.0,
             "bytes": 4096, "error": 0.01 * i}
            for i in range(3)
        ],
        "kept": {"model.language_model.norm.weight": 256},
        "memory": memory.to_json() | {"advice": [x.to_json() for x in advise(plan, geometry, target, memory)]},
        "latency": plan_latency(plan, geometry, target, work).to_json(),
        "validation": [
            {"stage": "torch against onnx", "tap": "decoder.layers.0", "max_abs": 1.2e-6, "verdict": "pass"},
            {"stage": "torch against onnx", "tap": "decoder.layers.1", "max_abs": 0.5, "verdict": "fail"},
        ],
        "questions": [
            {"image": tmp_path / "q.png", "prompt": "how many? & <b>", "expected": "2",
             "answers": {"fp": "2", "mgvq": "3"}}
        ],
        "engines": {
            "backend": "tensorrt_rtx", "builder_version": "1.7", "sm": "86",
            "engines": [{"graph": "vision", "bytes": 2000, "dense_bytes": 4000, "layers": 12, "seconds": 0.5}],
        },
        "versions": {"torch": "2.13.0"},
        "commands": ["pip install .", "mgvq demo"],
    }  # fmt: skip


class Outline(HTMLParser):
    """Section ids, and every address the page would load; fails on tags that do not nest."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.headings, self.addresses, self.images_without_alt = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "h2":
            self.headings.append(attributes["id"])
        self.addresses += [attributes[key] for key in ("src", "href") if attributes.get(key)]
        self.images_without_alt += tag == "img" and not attributes.get("alt")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert parser.stack == []
    return parser


def test_every_section_is_there_once_and_nothing_is_loaded(data):
    page = render_report(data)
    found = outline(page)
    assert found.headings == list(SECTIONS)
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert found.images_without_alt == 0
    assert not re.search(r"https?://|@import|<script", page)
    assert page.lstrip().startswith("<!doctype html>")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_left_out(data, section):
    found = outline(render_report({key: value for key, value in data.items() if key != section}))
    assert found.headings == [name for name in SECTIONS if name != section]


def test_nothing_at_all_is_still_a_page():
    assert outline(render_report({})).headings == []


def test_text_is_escaped(data):
    page = render_report(data)
    assert "how many? &amp; &lt;b&gt;" in page
    assert "<b>" not in page.split("Questions asked")[1].split("Validation")[0]
    assert "demo &lt;run&gt;" in page


def test_figures_and_verdicts_are_shown(data):
    page = render_report(data)
    for text in (
        "97.0 %",
        "99.1 %",
        "61.0 %",
        "2.61",
        "decoder.layers.1",
        "3 (wrong)",
        "2 (right)",
        "1.2e-06",
        "mgvq demo",
    ):
        assert text in page, text
    assert page.count('class="bar"') >= 3 + 3  # one bar a layer and chart, and the memory parts


def test_of_many_layers_those_with_the_largest_errors_are_shown(data):
    layers = [data["layers"][0] | {"name": f"layer{i:02}", "error": 0.0001 * i, "bits": 2 + i % 2} for i in range(40)]
    page = render_report(data | {"layers": layers})
    chart, details = page.split("the 12 largest of 40 layers")[1].split("<details>")[:2]
    assert re.findall(r'class="label">(\w+)', chart) == [f"layer{i}" for i in range(39, 27, -1)]
    assert "0.39 %" in chart
    assert details.count('class="bar"') == 40  # bits, in the model's order


def test_validation_is_summed_up_by_what_was_compared(data):
    def row(compared, tap, error, verdict, budget="0.0001"):
        return {"compared": compared, "tap": tap, "relative error": error, "budget": budget, "verdict": verdict}

    rows = [row("a against b", f"layer{i}", f"{i}.00e-06", "pass") for i in range(9)]
    rows += [row("c against b", "x", "2.00e-03", "fail"), row("c against b", "y", "1.00e-05", "pass", "0.1")]
    rows += [row("d against e", "z", "1.00e-01", "not gated", "none"), {"compared": "answers", "verdict": "pass"}]
    page = render_report(data | {"validation": rows})
    summary = page.split('id="validation"')[1].split("<details>")[0]
    shown = [re.sub(r"<[^>]+>", " ", line).split() for line in summary.splitlines() if line.startswith("<tr><th")]
    assert [" ".join(words) for words in shown] == [
        "a against b 9 8.00e-06 8 % pass",
        "c against b 2 2.00e-03 2000 % fail: 1",
        "d against e 1 1.00e-01 – not gated",
        "answers 1 – – pass",
    ]
    assert re.search(r'<td class="pass">pass', summary)
    assert '<td class="fail">fail: 1</td>' in summary
    assert "<td>not gated</td>" in summary
    assert "All 13 comparisons" in page


def test_unknown_sections_and_bad_images_are_refused(data, tmp_path):
    with pytest.raises(UsageError, match=r"sections \['colour'\] are not known"):
        render_report({"colour": 1})
    (tmp_path / "x.png").write_bytes(b"not a picture")
    for image, message in ((tmp_path / "x.png", "is not PNG"), (tmp_path / "none.png", "cannot be read")):
        with pytest.raises(InputDataError, match=message):
            render_report({"questions": [data["questions"][0] | {"image": image}]})


def test_write_report_leaves_one_file(data, tmp_path):
    write_report(data, tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == render_report(data)
    assert not (tmp_path / "out.html.tmp").exists()


def test_numbers_for_people():
    assert [size_text(x) for x in (812, 3 << 20, 1_331_439_862)] == ["812 B", "3 MiB", "1.24 GiB"]
    assert [number_text(x) for x in (1234567, 0.123456, "a", True)] == ["1,234,567", "0.1235", "a", "True"]
    assert [bar.share for bar in bars([("a", 2.0, ""), ("b", 1.0, ""), ("c", 0.0, "")])] == [1.0, 0.5, 0.0]
    assert [ms_text(x) for x in (1459.6, 146.31, 40.99, 0.71214, 0.00633, 0, -1.5)] == [
        "1,460", "146", "41.0", "0.712", "0.0063", "0", "-1.50"
    ]  # fmt: skip
