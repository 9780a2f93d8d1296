"""What users get: the wheel, the editable install, and an `import vtc` that costs and changes nothing."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"vtc": "vtc", "adapters": "vtc/adapters", "eval": "vtc/eval"}  # in the checkout -> installed


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what is packaged: builds leave traces, and old traces end up in new wheels."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the source distribution, so that a file missing there is noticed too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=checkout)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(
    request: pytest.FixtureRequest, checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of a fresh environment with vtc installed; everything else is borrowed from this environment."""
    env = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
    scripts = env / ("Scripts" if sys.platform == "win32" else "bin")
    inside = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=env).strip()
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(inside, "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    what = [wheel] if request.param == "wheel" else ["--editable", checkout]
    pip = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--ignore-installed", *what, cwd=env)
    return scripts / "python"


def packaged(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_every_folder_with_python_files_is_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {
        ".".join((installed, *file.parent.relative_to(ROOT / name).parts)).replace("/", ".")
        for name, installed in FOLDERS.items()
        for file in (ROOT / name).rglob("*.py")
        if not {"adapters", "eval"} & set(file.relative_to(ROOT / name).parts[:1])  # the links inside vtc/
    }
    assert sorted(config["options"]["packages"].split()) == sorted(folders)


def test_the_wheel_holds_every_file_and_nothing_else(checkout: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{installed}/{file.relative_to(ROOT / name).as_posix()}"
        for name, installed in FOLDERS.items()
        for file in packaged(ROOT / name)
        if not (name == "vtc" and file.relative_to(ROOT / name).parts[0] in FOLDERS)
    }
    assert names == expected
    assert "vtc/py.typed" in names and "vtc/eval/assets/scenes.npz" in names


def test_core_dependencies_are_torch_and_transformers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    requires = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [line.split(">")[0] for line in requires if "extra ==" not in line] == ["torch", "transformers"]
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"triton", "video", "eval", "viz", "lmms", "explore", "docs", "test", "dev"}
    assert "License: Apache-2.0" in lines


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_installed_package_works(python: Path, checkout: Path, tmp_path: Path, where: str) -> None:
    code = """
import vtc, vtc.adapters.llava, vtc.eval.scenes, vtc.strategies, vtc.zoo, importlib.util, json, os
names = [n for n in ("adapters", "eval") if importlib.util.find_spec(n) is not None]
print(json.dumps([vtc.__file__, vtc.eval.__file__, names, list(vtc.available())]))
"""
    cwd = checkout if where == "inside" else tmp_path
    here, evaluation, names, available = json.loads(run(python, "-c", code, cwd=cwd))
    assert Path(here).is_relative_to(checkout) or Path(here).is_relative_to(python.parents[1])
    assert Path(evaluation).parent == Path(here).parent / "eval"
    assert not names or where == "inside"  # a checkout's own folders, because Python puts its working folder first
    assert "fastervlm" in available


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_installed_commands_work(python: Path, checkout: Path, tmp_path: Path, where: str) -> None:
    cwd = checkout if where == "inside" else tmp_path
    script = run(python.with_name("vtc"), "--help", cwd=cwd)
    module = run(python, "-m", "vtc", "--help", cwd=cwd)
    assert "bench" in script and script == module


def test_import_loads_only_vtc_and_the_standard_library(tmp_path: Path) -> None:
    code = """
import os, sys
before, environment = set(sys.modules), dict(os.environ)
import vtc
dir(vtc)
assert dict(os.environ) == environment
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["vtc"]


def test_importing_every_module_leaves_the_host_as_it_was(tmp_path: Path) -> None:
    """No registration, no global hook, no changed default: patching happens in `vtc.compress`, on one model."""
    code = """
import os, pkgutil, random, sys, warnings
import torch, transformers
from vtc.zoo import torchvision
torchvision.mend()  # transformers' processors import it
from torch.nn.modules import module
from transformers import AttentionInterface, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.masking_utils import AttentionMaskInterface

def state():
    return {
        "environment": dict(os.environ),
        "attention": list(AttentionInterface().valid_keys()),
        "masks": list(AttentionMaskInterface().valid_keys()),
        "models": [len(auto._model_mapping._extra_content) for auto in (AutoModel, AutoModelForImageTextToText)],
        "hooks": {name: len(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")},
        "call": torch.nn.Module.__call__,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seeds": (torch.initial_seed(), random.getstate()),
        "filters": list(warnings.filters),
        "path": list(sys.path),
        "backends": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark),
    }

before = state()
import vtc, vtc.adapters, vtc.eval
modules = [m.name for m in pkgutil.walk_packages(vtc.__path__, "vtc.") if not m.name.endswith("__main__")]
for name in ("vtc.eval.lmms.plugin", "vtc.eval.explore_page"):  # made for lmms-eval and gradio, which change much
    modules.remove(name)
assert "vtc.session" in modules and "vtc.adapters.llava" in modules and "vtc.eval.scenes" in modules, modules
for name in modules:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # it exists for Linux only
            raise
after = state()
assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
"""
    run(sys.executable, "-c", code, cwd=tmp_path)
