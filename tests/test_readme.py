"""The README's examples run and print what they say, and its tables are those of the code."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backprop_gpu.mlp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)

NUMBER = re.compile(r"-?\d+\.\d+")


def test_every_python_example_has_its_output():
    assert len(EXAMPLES) == README.count("```python") >= 2


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_print_what_the_readme_says(code, output, tmp_path):
    if "import torch" in code:
        pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch)")
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # Decimals may differ in their last places from one processor's rounding to another's.
    assert NUMBER.sub("#", printed.stdout) == NUMBER.sub("#", output)
    numbers, expected = ([float(x) for x in NUMBER.findall(text)] for text in (printed.stdout, output))
    assert numbers == pytest.approx(expected, abs=0.02)


def test_the_tables_are_up_to_date():
    assert subprocess.run([sys.executable, "-m", "bench.report", "--check"], cwd=ROOT).returncode == 0


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_example_in_the_class_documentation_holds():
    assert doctest.testmod(backprop_gpu.mlp) == (0, 5)
