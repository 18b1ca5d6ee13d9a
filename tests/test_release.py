"""What is released: the wheel of the sdist installs into an environment of its own and works outside the sources."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import sgl_npu

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SMOKE = """
import importlib.resources as resources, sys, pathlib, tempfile
import torch, sgl_npu
here = pathlib.Path(sgl_npu.__file__)
assert here.is_relative_to(sys.prefix), here
assert (here.parent / "py.typed").exists()
q = torch.randn(1, 2, 8, 16)
attend = lambda q: (q @ q.transpose(2, 3) / 4).softmax(-1) @ q
for options in ({"inner": "eager"}, {"platform": "npu", "inner": "eager"}):
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(attend, backend="sgl_npu", options=options)(q), attend(q))
report = sgl_npu.explain(attend, q, options={"platform": "npu"})
sgl_npu.expect(report, fused="all")
page = pathlib.Path(tempfile.mkdtemp()) / "report.html"
report.to_html(page)
assert "<style" in page.read_text() and "<script" in page.read_text()
"""


def test_versions_agree():
    assert PROJECT["project"]["version"] == sgl_npu.__version__
    assert f"## {sgl_npu.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_folder_of_the_package_is_in_the_wheel():
    listed = PROJECT["tool"]["setuptools"]
    folders = {
        path.parent
        for part in ("compiler", "passes", "lowering", "runtime", "sgl_npu")
        for path in (ROOT / part).rglob("*.py")
    }
    assert folders == {ROOT / listed["package-dir"][name] for name in listed["packages"]}


@pytest.mark.slow
def test_the_wheel_of_the_sdist_works_outside_the_sources(tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sgl_npu/py.typed" in names and "sgl_npu/compiler/backend.py" in names
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
    # torch and the other libraries are those of this environment, but not its sgl_npu, which is a link to the sources.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = tmp_path / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
        wheel,
        cwd=tmp_path,
    )
    run(python, "-c", SMOKE, cwd=tmp_path)
    assert "torch_npu" in run(python.with_name("sgl-npu"), "doctor", cwd=tmp_path)


def run(*command, cwd):
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
