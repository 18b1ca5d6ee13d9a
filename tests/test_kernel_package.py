"""Kernels of sgl-kernel-npu are found by name and schema, whatever the release calls them."""

import gc
import sys
import types

import pytest
import torch

from sgl_npu.compiler.doctor import diagnose, package_kernel_statuses
from sgl_npu.runtime.npu import kernel_package
from sgl_npu.runtime.npu.kernel_package import KERNELS, Absent, KernelUnavailable, Resolved, normalise, resolve


def schema_of(name, index):
    form = KERNELS[name][index]
    return form.target.partition("::")[::2][0], form.target.partition("::")[2] + form.signature


@pytest.fixture
def resolve_beside(monkeypatch):
    """What `resolve` answers while torch ops of these schemas are defined. They are gone after the test."""
    libraries = []
    monkeypatch.setattr(kernel_package, "_resolved", {})

    def answer(name, *definitions):
        for namespace, schema in definitions:
            libraries.append(torch.library.Library(namespace, "FRAGMENT"))
            libraries[-1].define(schema)
        found = resolve(name)
        return (found.form.target, found.form.releases) if isinstance(found, Resolved) else str(found)

    yield answer
    libraries.clear()
    gc.collect()
    assert isinstance(resolve("laser_attention"), Absent)


@pytest.mark.parametrize(
    ("name", "present", "chosen"),
    [
        ("laser_attention", [0], 0),
        ("laser_attention", [1], 1),
        ("laser_attention", [1, 0], 0),
        ("block_sparse_attention", [1], 1),
        ("block_sparse_attention", [3], 3),
        ("block_sparse_attention", [3, 2], 2),
        ("rain_fusion_attention", [0], 0),
    ],
)
def test_the_newest_form_that_is_there_is_taken(resolve_beside, name, present, chosen):
    form = KERNELS[name][chosen]
    assert resolve_beside(name, *(schema_of(name, i) for i in present)) == (form.target, form.releases)


REORDERED = "la(Tensor key, Tensor query, Tensor value) -> (Tensor, Tensor)"
DRIFTED = schema_of("laser_attention", 1)[1].replace("int next_tokens=1", "float next_tokens=1")


@pytest.mark.parametrize("schema", [REORDERED, DRIFTED], ids=["reordered", "another type"])
def test_another_schema_is_refused_with_both_schemas_and_what_to_install(resolve_beside, schema):
    answer = resolve_beside("laser_attention", ("attentions", schema))
    assert f"attentions::la has the signature {normalise(schema)}, expected (Tensor query, Tensor key" in answer
    assert "./build.sh -a attentions (wheel attentions, releases 2026-05-06 to 2026-08-21)" in answer


def test_of_two_results_the_attention_is_the_first():
    forms = KERNELS["block_sparse_attention"]
    results = [Resolved("block_sparse_attention", form, lambda **_: ("out", "lse"))() for form in forms]
    assert results == ["out" if "-> (Tensor, Tensor)" in form.signature else ("out", "lse") for form in forms]
    assert results.count("out") == 1


def test_a_renamed_kernel_that_drifted_does_not_hide_an_older_one_that_fits(resolve_beside):
    new, old = ("npu", DRIFTED.replace("la(", "laser_attn(", 1)), schema_of("laser_attention", 1)
    assert resolve_beside("laser_attention", new, old)[0] == "attentions::la"


@pytest.mark.parametrize("name", KERNELS)
def test_without_the_package_the_answer_says_what_to_install(name):
    answer = resolve(name)
    assert isinstance(answer, Absent)
    assert all(form.target in answer.reason for form in KERNELS[name])
    assert "build the wheel from github.com/sgl-project/sgl-kernel-npu with ./build.sh -a" in answer.remedy
    with pytest.raises(KernelUnavailable, match="is there; on an Ascend machine"):
        kernel_package.require(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ns::op(Tensor x, int[]? n=None, str s='a,b') -> Tensor", "other(Tensor x,  int[]? n, str s) -> Tensor"),
        ("op(SymInt[] n, float f=1.0) -> (Tensor, Tensor)", "op(int[] n, float f) -> (Tensor, Tensor)"),
    ],
)
def test_names_and_defaults_do_not_count(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    "other",
    ["op(Tensor y, int n) -> Tensor", "op(int n, Tensor x) -> Tensor", "op(Tensor x, int n) -> (Tensor, Tensor)"],
)
def test_argument_names_their_order_and_the_results_count(other):
    assert normalise(other) != normalise("op(Tensor x, int n) -> Tensor")


# ---------------------------------------------------------------- Python functions


@pytest.fixture
def install(monkeypatch):
    """Puts a function of the given parameters where a release of sgl_kernel_npu has it."""

    def put(parameters):
        package, norm = types.ModuleType("sgl_kernel_npu"), types.ModuleType("sgl_kernel_npu.norm")
        module = types.ModuleType("sgl_kernel_npu.norm.split_qkv_rmsnorm_rope")
        namespace = {}
        exec(f"def split_qkv_rmsnorm_rope({parameters}): return dict(locals())", namespace)
        module.split_qkv_rmsnorm_rope = namespace["split_qkv_rmsnorm_rope"]
        for each in (package, norm, module):
            monkeypatch.setitem(sys.modules, each.__name__, each)

    monkeypatch.setattr(kernel_package, "_resolved", {})
    return put


SIZES = {"q_hidden_size": 16, "kv_hidden_size": 8, "head_dim": 4}
ARGUMENTS = {
    **{name: torch.zeros(3, 4) for name in ("input", "sin", "cos")},
    **{name: torch.zeros(4) for name in ("q_weight", "k_weight", "q_bias", "k_bias")},
    **SIZES,
    "eps": 1e-6,
    "is_neox_style": True,
}
NEWEST, SECOND, FIRST = (form.signature.strip("()") for form in KERNELS["split_qkv_rmsnorm_rope"])


@pytest.mark.parametrize("parameters", [NEWEST, SECOND, FIRST], ids=["newest", "second", "reordered"])
def test_every_release_gets_each_argument_under_its_own_name(install, parameters):
    install(parameters)
    kernel = resolve("split_qkv_rmsnorm_rope")
    assert isinstance(kernel, Resolved) and kernel.form.signature == f"({parameters})"
    received = kernel(**ARGUMENTS)
    assert received.keys() == set(parameters.replace(" ", "").split(","))
    assert all(received[name] is ARGUMENTS[name] for name in received)


@pytest.mark.parametrize(
    ("parameters", "change", "sentence"),
    [
        (SECOND, {"is_neox_style": False}, "is_neox_style = False; the installed release only rotates halves"),
        (SECOND, {"sin": torch.zeros(3, 2)}, "sin has 2 columns and head_dim is 4; the installed release may only"),
        (FIRST, {"eps": None}, "eps = None; the installed release always normalises"),
    ],
)
def test_what_an_old_release_cannot_is_refused(install, parameters, change, sentence):
    install(parameters)
    with pytest.raises(KernelUnavailable, match=f"{sentence}.*; install a release of sgl_kernel_npu since 2026-05-27"):
        kernel_package.require("split_qkv_rmsnorm_rope")(**ARGUMENTS | change)


def test_a_function_with_other_parameters_is_refused(install):
    install("input, cos, sin, q_hidden_size")
    answer = str(resolve("split_qkv_rmsnorm_rope"))
    assert "has the signature (input, cos, sin, q_hidden_size), expected (input, sin, cos, q_hidden_size" in answer


def test_a_package_whose_import_fails_is_named_with_its_error(monkeypatch, tmp_path):
    (tmp_path / "attentions.py").write_text("raise OSError('libPTAExtensionOPS.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    answer = str(resolve("rain_fusion_attention"))
    assert "the import of attentions fails: libPTAExtensionOPS.so: cannot open" in answer


# ---------------------------------------------------------------- the doctor


def test_the_doctor_lists_every_kernel_with_what_to_install():
    rows = {row.kernel: row for row in package_kernel_statuses()}
    assert rows.keys() == KERNELS.keys()
    for name, row in rows.items():
        assert row.state == ("unavailable" if name == "split_qkv_rmsnorm_mrope" else "emulated")
        assert row.reason.startswith(f"{name}: none of") and "./build.sh -a" in row.remedy
    assert {row["kernel"] for row in diagnose()["kernels"]} >= KERNELS.keys()


def test_the_doctor_names_what_it_found(resolve_beside, monkeypatch):
    resolve_beside("laser_attention", schema_of("laser_attention", 1))
    monkeypatch.setattr(kernel_package.importlib.metadata, "version", lambda package: {"attentions": "0.2"}[package])
    found = next(row for row in package_kernel_statuses() if row.kernel == "laser_attention")
    assert (found.op, found.state) == ("attentions::la (attentions 0.2)", "available")


def test_the_doctor_shows_a_schema_that_drifted(resolve_beside):
    resolve_beside("laser_attention", ("attentions", REORDERED))
    found = next(row for row in package_kernel_statuses() if row.kernel == "laser_attention")
    assert found.state == "emulated" and "has the signature (Tensor key, Tensor query" in found.reason
