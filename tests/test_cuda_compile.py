"""The CUDA C++ kernels, compiled by NVRTC for every architecture on a machine without a GPU, and the machine code.

Here every tile, access, activation, loss and optimizer is compiled once to PTX for 8.0, and every tile and access for
7.5, from which the loops of the products differ; and to machine code what the table of resources has, for two
architectures, and of it the largest tiles for the others. `python tests/cuda_nvrtc/everything.py` compiles all that the
library may launch to machine code.
"""

import pytest
from cuda_nvrtc import compiler, everything, resources, variants

from backprop_gpu.backends import cuda_plan

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))

MACHINE_CODE = ("80", "90")
"""Whose table and instructions are looked at in every run."""


def test_every_architecture_is_one_of_nvrtc():
    assert set(map(int, variants.ARCHITECTURES)) <= set(compiler.architectures())


@pytest.mark.parametrize("architecture", ["75", "80"])
def test_what_covers_all_sources_compiles(architecture):
    """Only the loops of products depend on the architecture; what the table has is compiled below."""
    elsewhere = variants.representative() if architecture in MACHINE_CODE else ()
    enough = variants.covering() if architecture == "80" else variants.every_tile()
    wanted = [variant for variant in enough if variant.runs_on(architecture) and variant not in elsewhere]
    compiled = list(compiler.compile_all(wanted, architecture, machine_code=False))
    assert sum(len(program.names) for program in compiled) == len(wanted)
    assert all(f".target sm_{architecture}" in program.ptx for program in compiled)


@pytest.mark.parametrize("architecture", [a for a in variants.ARCHITECTURES if a not in MACHINE_CODE])
def test_the_largest_tiles_assemble(architecture):
    """And use the registers that the table says."""
    largest = [v for v in variants.representative() if v.operation == "dense_backward" and v.tile.efficiency == 1]
    for compiled in compiler.compile_all(largest, architecture, machine_code=True):
        assert_as_in_table(compiled)


@pytest.mark.parametrize("architecture", MACHINE_CODE)
def test_machine_code(architecture):
    """One test for each, as compiling takes most of the time, and processes share nothing."""
    programs = list(compiler.compile_all(variants.representative(), architecture, machine_code=True))
    for compiled in programs:
        assert_as_in_table(compiled)
        assert not [variant for variant, actual in compiled.resources.items() if actual.spilled]
    if compiler.disassembler() is None:
        pytest.skip("looking at machine code needs the wheel nvidia-cuda-nvdisasm")
    for compiled in programs:
        for variant, code in compiler.disassemble(compiled).items():
            assert_no_local_memory_and_no_atomics_on_floats(variant, code)
            if variant.tile:
                assert_copied_16_bytes_at_a_time_past_the_registers(variant, code)
                assert_made_of_the_instructions_they_are_for(variant, code)


def assert_as_in_table(compiled):
    """Exactly, by the NVRTC that made the table; another one may choose other registers."""
    table = resources.read()
    for variant, actual in compiled.resources.items():
        expected = table.rows[variant.expression]
        assert not actual.arrays
        assert actual.spilled <= resources.MOST_SPILLED
        assert actual.registers <= resources.most_registers(variant)
        if compiler.version() == table.nvrtc:
            used = expected.used[compiled.architecture]
            assert (actual.registers, actual.spilled) == used, f"{variant.expression}: run {resources.__file__}"


def test_the_table_has_every_representative_variant():
    table = resources.read()
    assert list(table.rows) == [variant.expression for variant in variants.representative()]
    for variant in variants.representative():
        row = table.rows[variant.expression]
        assert list(row.used) == [a for a in variants.ARCHITECTURES if variant.runs_on(a)]
        assert max(registers for registers, _ in row.used.values()) <= resources.most_registers(variant)
        assert row.shared_bytes == variant.shared_bytes
        assert row.static_shared <= cuda_plan.STATIC_BYTES


def test_everything_is_compiled_in_pieces(tmp_path, capsys, monkeypatch):
    """What is done is not done again, until a source is another."""
    record, wanted = tmp_path / "record", everything.jobs(("75", "90"), ("gather", "convert"))
    everything.run(wanted[:1], record, minutes=0)
    assert everything.remaining(wanted, record) == wanted
    everything.run(wanted[:1], record, minutes=float("inf"))
    assert everything.remaining(wanted, record) == wanted[1:]
    everything.report(wanted, record)
    of = {job.architecture: len(job.variants) for job in wanted}
    there = of | {job.architecture: 0 for job in wanted[1:]}
    expected = [f"{a}: {there[a]} of {of[a]} variants compiled, 0 spill" for a in ("75", "90")]
    assert capsys.readouterr().out.splitlines() == expected
    monkeypatch.setattr(everything, "sources", lambda: "")
    assert everything.remaining(wanted, record) == wanted


def test_the_pieces_are_all_variants():
    wanted = everything.jobs(variants.ARCHITECTURES, ())
    compiled = [(job.architecture, variant) for job in wanted for variant in job.variants]
    there = [(a, v) for v in variants.everything() for a in variants.ARCHITECTURES if v.runs_on(a)]
    assert len(compiled) == len(there)
    assert set(compiled) == set(there)
    assert all(len({variant.file for variant in job.variants}) == 1 for job in wanted)


# Machine code


def assert_no_local_memory_and_no_atomics_on_floats(variant, code):
    assert not [i for i in code if i.startswith(("LDL", "STL"))], variant.expression
    atomics = [i for i in code if i.startswith(("ATOM", "RED.", "REDG", "REDUX"))]
    assert not [i for i in atomics if ".F" in i], variant.expression


def assert_copied_16_bytes_at_a_time_past_the_registers(variant, code):
    """Aligned operands."""
    copies = [i for i in code if i.startswith("LDGSTS")]
    assert copies, variant.expression
    assert all(".128" in i for i in copies), variant.expression


def assert_made_of_the_instructions_they_are_for(variant, code):
    """Products; and of as many as one turn of the loop over k has for a thread."""
    multiply, loads = {
        "float32": ("FFMA", "LDS"),
        "float64": ("DFMA", "LDS"),
        "tf32": ("HMMA.1688.F32.TF32", "LDS"),
        "bfloat16": ("HMMA.16816.F32.BF16", "LDSM"),
        "float16": ("HMMA.16816.F32", "LDSM"),
    }[variant.tile.dtype]
    assert len([i for i in code if i.startswith(multiply)]) >= multiplications(variant.tile), variant.expression
    assert [i for i in code if i.startswith(loads)], variant.expression


def multiplications(tile):
    """Of a thread, or of a warp on the tensor cores, in a tile of k: 16 x 8 x 8, or with 16-bit numbers 16 x 8 x 16."""
    products = tile.m * tile.n * tile.k
    if tile.dtype in ("float32", "float64"):
        return products // tile.threads
    return products // (16 * 8 * (8 if tile.dtype == "tf32" else 16)) // (tile.threads // 32)
