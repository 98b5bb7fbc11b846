"""Patches: the exact difference of two models, in one file, which can be put on and taken off bit for bit.

    D = bits(W) ⊕ bits(W′),    bits(W′) = bits(W) ⊕ D,    bits(W) = bits(W′) ⊕ D        (⊕: exclusive or)

with W and W′ a tensor before and after as checkpoints store it. A difference of numbers would not do: W + (W′ − W) is
rounded, and W′ − (W′ − W) as well. ⊕ costs what the changed tensors themselves cost, two bytes a weight in bfloat16 and
four in float32; a patch cannot be scaled, and is refused for a model that differs from the one it was made for.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .artifacts import check_space, write_tensors
from .errors import ArtifactError, ConfigError, ModelError
from .models import tensor_fingerprints
from .offload import State

FORMAT = 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What turns one model into another, and back.

    Args:
        changes: D by tensor name, integers, each in the shape of its tensor.
        dtypes: The stored dtype of each, such as ``bfloat16``.
        before: By name, a hash of every bit of the tensor before.
        after: And after.
        base: By name, the fingerprints of all tensors of the model before (:func:`tensor_fingerprints`).
        result: Those of the changed tensors after.
        about: What it is: model, editor, edits; JSON-ready.
    """

    changes: Mapping[str, Tensor] = field(repr=False)
    dtypes: Mapping[str, str]
    before: Mapping[str, str] = field(repr=False)
    after: Mapping[str, str] = field(repr=False)
    base: Mapping[str, str] = field(repr=False)
    result: Mapping[str, str] = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def between(cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor], about: Mapping[str, Any]) -> Self:
        """The patch that turns one model's tensors into another's.

        Args:
            before: All tensors by name, as they are stored.
            after: Those of the other model.
            about: What the patch is.

        Returns:
            The patch.

        Raises:
            ModelError: The models have tensors of other names, shapes or dtypes.
        """
        for name in sorted(before.keys() | after.keys()):
            one, other = (
                f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "none"
                for tensors in (before, after)
            )
            if one != other:
                raise ModelError(f"no patch can join these models: of {name} one has {one}, the other {other}")
        return cls.of_changes(
            {name: (old, after[name]) for name, old in before.items()}, tensor_fingerprints(before), about
        )

    @classmethod
    def of_changes(
        cls, pairs: Mapping[str, tuple[Tensor, Tensor]], base: Mapping[str, str], about: Mapping[str, Any]
    ) -> Self:
        """The patch of a model in which nothing but these tensors can have changed.

        Args:
            pairs: Of them before and after, by name, as they are stored; those without a difference are left out.
            base: The fingerprints of all tensors before.
            about: What the patch is.

        Returns:
            The patch.
        """
        changed = {name: pair for name, pair in pairs.items() if not _same_bits(*pair)}
        return cls(
            changes={name: (_bits(old) ^ _bits(new).to(old.device)).cpu() for name, (old, new) in changed.items()},
            dtypes={name: str(old.dtype).removeprefix("torch.") for name, (old, _) in changed.items()},
            before={name: _hash(old) for name, (old, _) in changed.items()},
            after={name: _hash(new) for name, (_, new) in changed.items()},
            base=dict(base),
            result=tensor_fingerprints({name: new for name, (_, new) in changed.items()}),
            about=dict(about),
        )

    @property
    def num_bytes(self) -> int:
        """Of the changes."""
        return sum(change.nbytes for change in self.changes.values())

    def reversed(self) -> "Patch":
        """The patch that takes this one off: the same bits, the other way round."""
        return replace(
            self,
            before=self.after,
            after=self.before,
            base={**self.base, **self.result},
            result={name: self.base[name] for name in self.changes},
        )

    def then(self, later: "Patch") -> "Patch":
        """The one patch that does what this one and a later one do.

        Args:
            later: A patch of this one's result.

        Returns:
            The patch; what the later one undoes is not in it.

        Raises:
            ModelError: ``later`` is a patch of another model.
        """
        later._check({**self.base, **self.result}, self.after)
        changes = {name: change.clone() for name, change in self.changes.items()}
        for name, change in later.changes.items():
            changes[name] = changes[name] ^ change.to(changes[name].device) if name in changes else change
        kept = {name: change for name, change in changes.items() if change.any()}

        def joined(mine: Mapping[str, str], its: Mapping[str, str]) -> dict[str, str]:
            return {name: {**mine, **its}[name] for name in kept}

        return Patch(
            changes=kept,
            dtypes=joined(self.dtypes, later.dtypes),
            before=joined(later.before, self.before),
            after=joined(self.after, later.after),
            base=self.base,
            result=joined(self.result, later.result),
            about={"stacked": [*self.about.get("stacked", [self.about]), *later.about.get("stacked", [later.about])]},
        )

    def applied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors of a model, as they are after it.

        Args:
            tensors: All tensors of the model by name, as they are stored; they are not touched.

        Returns:
            New tensors by name, on the devices of the old ones.

        Raises:
            ModelError: It is another model than the one that the patch is for; the difference is named.
            ArtifactError: The patch does not give the bits that it should: it is damaged.
        """
        exact = {name: _hash(tensors[name]) for name in self.changes if name in tensors}
        self._check(tensor_fingerprints(tensors), exact)
        found = {}
        for name, change in self.changes.items():
            old = tensors[name]
            found[name] = (_bits(old) ^ change.to(old.device)).view(old.dtype)
            if _hash(found[name]) != self.after[name]:
                raise ArtifactError(f"the patch is damaged: it does not give the weights that it should in {name}")
        return found

    def _check(self, fingerprints: Mapping[str, str], exact: Mapping[str, str]) -> None:
        """Refuses a model that this is no patch for; of changed tensors every bit counts, where it is known."""
        others = sorted(
            name for name in self.base.keys() | fingerprints.keys() if self._differs(name, fingerprints, exact)
        )
        if not others:
            return
        if all(exact.get(name) == self.after[name] for name in self.changes):
            others = [name for name in others if name not in self.changes]
            if not others:
                raise ModelError("nothing to do: the model is already as this patch would make it")
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        known = self.about.get("model")
        of = f"; it is a patch for {known}" if known else ""
        raise ModelError(f"the patch is for another model: {others[0]}{more} differ{'' if more else 's'}{of}")

    def _differs(self, name: str, fingerprints: Mapping[str, str], exact: Mapping[str, str]) -> bool:
        """Whether a tensor is not the one that the patch knows."""
        return self.base.get(name) != fingerprints.get(name) or (
            name in self.before and name in exact and exact[name] != self.before[name]
        )

    def write(self, path: Path) -> None:
        """Writes the patch, whole or not at all.

        Args:
            path: A safetensors file.

        Raises:
            ArtifactError: It cannot be written, or there is too little room.
        """
        check_space(path.absolute().parent, self.num_bytes)
        changes = {name: change.cpu().contiguous() for name, change in self.changes.items()}
        manifest = {
            "format": FORMAT,
            "about": dict(self.about),
            "dtypes": dict(self.dtypes),
            "shapes": {name: list(change.shape) for name, change in changes.items()},
            "before": dict(self.before),
            "after": dict(self.after),
            "base": dict(self.base),
            "result": dict(self.result),
            "checksums": {name: _hash(change) for name, change in changes.items()},
        }
        write_tensors(path, changes, {"crispedit_patch": json.dumps(manifest)}, "the patch")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a patch.

        Args:
            path: As :meth:`write` wrote it.

        Returns:
            The patch.

        Raises:
            ArtifactError: It is no patch, or one of a later format, or damaged.
        """
        manifest = read_manifest(path)
        try:
            with safe_open(path, "pt") as file:
                changes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"'{path}' is damaged: {error}") from error
        wrong = [name for name, checksum in manifest.pop("checksums").items() if _hash(changes[name]) != checksum]
        if wrong:
            raise ArtifactError(f"'{path}' is damaged: the checksum of {wrong[0]} is another")
        del manifest["format"], manifest["shapes"]
        return cls(changes=changes, **manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a patch file says of itself, without reading a tensor.

    Args:
        path: The file.

    Returns:
        ``format``, ``about``, ``dtypes``, ``shapes``, ``before``, ``after``, ``base``, ``result`` and ``checksums``.

    Raises:
        ArtifactError: It is no patch, or one of a later format.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("crispedit_patch")
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no patch '{path}'") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' is damaged, or no patch: {error}") from error
    if text is None:
        raise ArtifactError(f"'{path}' is no patch of crispedit")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != FORMAT:
        raise ArtifactError(f"'{path}' has format {manifest['format']}, and this version reads {FORMAT}")
    return manifest


class StoredTensors(Mapping[str, Tensor]):
    """A model's tensors as its checkpoint has them, one at a time; tied tensors once, by the parameter's name.

    Args:
        model: The model; its weights may be in another dtype than the checkpoint's, which is exact.
        dtype: The checkpoint's.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.state, self.computed, self.dtype = State(model), model.dtype, dtype
        self.names = [name for name, _ in model.named_parameters()]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name].detach()
        return tensor.to(self.dtype) if tensor.dtype == self.computed else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def apply_to(model: Any, patch: Patch, dtype: torch.dtype) -> None:
    """Puts a patch on a model in memory.

    Args:
        model: Changed in place, or not at all.
        patch: The patch.
        dtype: The checkpoint's dtype.

    Raises:
        ConfigError: What it changes waits elsewhere (:mod:`crispedit.offload`).
    """
    new = patch.applied(StoredTensors(model, dtype))
    if waits := [name for name in new if model.get_parameter(name).is_meta]:
        raise ConfigError(f"the patch changes {waits[0]}, which waits elsewhere: leave --offload out")
    for name, tensor in new.items():
        model.get_parameter(name).copy_(tensor)


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, in its shape."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one kind agree in every bit (−0 is not 0, and a NaN is itself)."""
    return torch.equal(_bits(one), _bits(other).to(one.device))


def _hash(tensor: Tensor) -> str:
    """Of every bit."""
    return hashlib.sha256(_bits(tensor).cpu().numpy().tobytes()).hexdigest()
