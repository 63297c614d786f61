"""What is private to a library is used in the ``*_internals.py`` modules of ``alignkit/models``, or listed here."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.online import RolesTrainer
from alignkit_dpo.trainer import DPOTrainer
from alignkit_kto.trainer import KTOTrainer
from alignkit_ppo.trainer import PPOTrainer
from alignkit_rm.trainer import RewardTrainer
from alignkit_sft.trainer import SFTTrainer

ROOT = Path(__file__).parents[1]


# --- methods that cannot move: the Trainer calls them ----------------------------------------------------------------

OVERRIDDEN = {
    "alignkit/training/reference_trainer.py": {
        "_prepare_dataset": "(self, dataset, processing_class, args, dataset_name)",
        "_precompute_ref_logps": "(self, dataset, name, batch_size)",
        "_save": "(self, output_dir=None, state_dict=None)",
    },
    "alignkit/online/roles_trainer.py": {
        "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    },
}

TRAINERS = (RolesTrainer, PPOTrainer, DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer)


def _signature(method: Any) -> str:
    signature = inspect.signature(method)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_overridden_private_methods_are_known_and_have_the_signature_that_they_had() -> None:
    found: dict[str, dict[str, str]] = {}
    for trainer in TRAINERS:
        library = [cls for cls in trainer.__mro__ if cls.__module__.split(".")[0] in ("trl", "transformers")]
        for own in (cls for cls in trainer.__mro__ if cls.__module__.startswith("alignkit")):
            file = str(Path(inspect.getfile(own)).relative_to(ROOT))
            for name in (name for name in vars(own) if name.startswith("_") and not name.startswith("__")):
                owner = next((cls for cls in library if name in vars(cls)), None)
                if owner is not None:
                    found.setdefault(file, {})[name] = _signature(vars(owner)[name])

    assert found == OVERRIDDEN, "a private method of a trainer that these files override has changed"


# --- nothing else ----------------------------------------------------------------------------------------------------

ROOMS = {f"alignkit/models/{name}_internals.py" for name in ("peft", "torch", "transformers", "trl")}

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")

DOCUMENTED = {  # modules below the top of a library that its documentation imports from
    *("torch.autograd", "torch.nn", "torch.nn.functional", "torch.nn.attention", "torch.nn.utils.rnn", "torch.optim"),
    *("torch.distributed", "torch.distributed.device_mesh", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.multiprocessing.errors"),
    *("torch.distributed.launcher.api", "torch.distributed.rendezvous", "torch.utils.data"),
    "transformers.integrations.deepspeed",
    *("torch.optim.lr_scheduler", "torch.overrides", "torch.utils.checkpoint", "torch.utils.tensorboard"),
    *("accelerate.utils", "transformers.cache_utils", "transformers.utils", "trl.kernels"),
}


# wings under `models` cannot import its modules
ELSEWHERE = {
    ("alignkit/data/token_cache.py", "datasets.arrow_writer"),  # tested above
    ("alignkit/data/sources.py", "_fingerprint"),  # tested above
    ("alignkit/data/pieces.py", "_encode_plus"),  # where it is missing, texts are tokenized whole
    ("plugins/alignkit_sft/trainer.py", "_train_batch_size"),  # which the Trainer's own loader uses
}

PYTHONS = {"_getframe", "_replace", "_asdict", "_fields"}  # documented, in spite of their names


def _private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names in a module that are not defined in it, and imports from undocumented modules of libraries."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name not in own and _is_private(name):
                yield name
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]) if (
                function in ("getattr", "hasattr", "setattr", "delattr") and name not in own and _is_private(name)
            ):
                yield name
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in LIBRARIES:
                if "." in module and module not in DOCUMENTED:
                    yield module
                yield from (alias.name for alias in node.names if _is_private(alias.name))
            case ast.Import():
                modules = (a.name for a in node.names if a.name.split(".")[0] in LIBRARIES and "." in a.name)
                yield from (module for module in modules if module not in DOCUMENTED)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_alignkit")) and name not in PYTHONS


def test_no_other_file_uses_what_is_private_to_a_library() -> None:
    files = [*ROOT.glob("alignkit/**/*.py"), *ROOT.glob("plugins/**/*.py")]
    used = {
        (str(file.relative_to(ROOT)), name)
        for file in files
        for name in _private_uses(ast.parse(file.read_text(encoding="utf-8")))
    }

    assert len(files) > 100
    assert {file for file, _ in used} >= ROOMS, "the search finds what is known to be there"
    assert {(file, name) for file, name in used if file not in ROOMS} == ELSEWHERE


def test_nothing_is_mocked_outside_of_tests() -> None:
    files = [*ROOT.glob("alignkit/**/*.py"), *ROOT.glob("plugins/**/*.py")]

    assert [str(file) for file in files if "mock" in file.read_text(encoding="utf-8")] == []
