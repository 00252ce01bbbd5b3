"""Every file rowscope writes: the values and their formats.

All writes go to a temporary name beside the target and are renamed at the end, so that a reader sees the old file,
the new file, or none. Formats are documented in ``docs/formats.md``; nothing else in rowscope reads or writes them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
AXES = ("row", "column")

AxisTensors = dict[str, dict[str, "Tensor"]]
"""``{module name: {"row" | "column": 1-D tensor}}``."""


# ---------------------------------------------------------------------------------------------- primitives


def checked_output(path: Path) -> Path:
    """`path` itself, if a file can be written there.

    Raises:
        InputError: if it is a folder or a device, or its folder cannot be written to.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no ordinary file: name another one to write")
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written in {folder}: name a file in a folder that may be written")
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, delete it on any failure."""
    path = checked_output(path).resolve()  # a link stays a link, its target is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(descriptor)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` on success, delete it on any failure.

    Raises:
        InputError: if there is already something at `path`, other than an empty folder, that is not to be replaced.
    """
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already holds something: name a new folder")
    checked_output(path / "file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        whole = Path(temporary) / path.name
        whole.mkdir()
        yield whole
        if path.exists():
            shutil.rmtree(path)
        whole.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with ``format_version`` first."""
    write_text(path, json.dumps({"format_version": FORMAT_VERSION, **value}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object written by :func:`write_json`.

    Raises:
        InputError: if the file is missing, is no JSON object, or has a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name a file that rowscope wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): write it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: name a file that rowscope wrote")
    _check_version(path, value.get("format_version"))
    return value


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write a YAML mapping atomically, keys in the order given."""
    import yaml

    write_text(path, yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises InputError if it is missing or no mapping."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())}): mend the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no mapping: write 'name: value' lines")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any]) -> None:
    """Write tensors atomically as safetensors; `header` becomes the one JSON string ``rowscope`` of the metadata."""
    import torch
    from safetensors.torch import save

    # safetensors refuses tensors that share memory
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    metadata = json.dumps({"format_version": FORMAT_VERSION, "kind": kind, **header})
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(own, {"rowscope": metadata}))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`write_tensors`: its tensors and its header.

    Raises:
        InputError: if the file is missing, truncated, or not of this `kind`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: name a {kind} file that rowscope wrote")
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("rowscope", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is no safetensors file: name a {kind} file that rowscope wrote") from None
        raise InputError(f"{path} is not a readable safetensors file ({error}): write it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} was not written by rowscope: name a {kind} file")
    if header.get("kind") != kind:
        raise InputError(f"{path} holds {header.get('kind', 'no rowscope data')}, not {kind}: name a {kind} file")
    _check_version(path, header.get("format_version"))
    return tensors, header


def tensor_file_kind(path: Path) -> str:
    """What a file of :func:`write_tensors` holds, e.g. ``scores``; empty if it is none. Only the header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            return str(json.loads((opened.metadata() or {}).get("rowscope", "{}")).get("kind", ""))
    except (SafetensorError, json.JSONDecodeError):
        return ""


def _check_version(path: Path, version: object) -> None:
    if version is not None and not isinstance(version, int):
        raise InputError(f"{path} has the odd format version {version!r}: write it again")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{path} has format {version}, newer than {FORMAT_VERSION}: upgrade rowscope")


# ---------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Provenance:
    """Where scores come from, and what they cost.

    Attributes:
        criterion: name and settings, spelled as on the command line, e.g. ``zo-taylor:passes=512``.
        model_source: hub id, folder or ``demo``.
        model_fingerprint: SHA-256 of the source checkpoint, see :func:`rowscope.models.fingerprint`.
        data_source: dataset the batches came from; empty for criteria without data.
        data_fingerprint: SHA-256 of the token ids and labels; empty for criteria without data.
        seed: seed of the batches and of the criterion.
        layers: names of the decoder/encoder blocks, in order.
        shapes: module -> ``(out_features, in_features)``.
        dtypes: module -> dtype of its weight, e.g. ``float32``.
        sizes: module -> number of its weights, where that is not ``out_features * in_features`` (convolutions).
        forward_passes: forward passes of one batch.
        backward_passes: backward passes of one batch.
        signal_to_noise: norm of the estimated signal over the norm of its noise; None where the score is exact.
        seconds: wall time of the scoring; None if it was not measured.
        peak_memory: bytes above the state before the scoring, see :func:`rowscope.scoring.cost.measured`; None if it
            is not known.
    """

    criterion: str
    model_source: str
    model_fingerprint: str
    layers: list[str]
    shapes: dict[str, tuple[int, int]]
    dtypes: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)
    data_source: str = ""
    data_fingerprint: str = ""
    seed: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    signal_to_noise: float | None = None
    seconds: float | None = None
    peak_memory: int | None = None

    def unit_cost(self, module: str, axis: str) -> int:
        """Weights of one row or one column of `module`."""
        return _unit_cost(module, axis, self.shapes, self.sizes)

    def lora_cost(self, module: str) -> int:
        """Weights of a LoRA of rank 1 on `module`: A reads what a row reads, B has a weight per output feature."""
        return self.unit_cost(module, "row") + self.shapes[module][0]


def _unit_cost(module: str, axis: str, shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> int:
    """Weights of one row or column: all there are, spread evenly over the rows, or over the columns."""
    shape = shapes[module]
    return sizes.get(module, shape[0] * shape[1]) // shape[AXES.index(axis)]


@contextmanager
def _damage_named(path: Path, mend: str) -> Iterator[None]:
    """Turn what reading a wrongly edited file raises into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise InputError(f"{path} is damaged ({reason}): {mend}") from error


def _flatten(prefix: str, table: AxisTensors) -> dict[str, Tensor]:
    return {f"{prefix}{module}/{axis}": tensor for module, axes in table.items() for axis, tensor in axes.items()}


def _unflatten(prefix: str, tensors: dict[str, Tensor], order: Iterable[str] = ()) -> AxisTensors:
    """The inverse of :func:`_flatten`; files are sorted by name, `order` puts the modules back into the model's."""
    table: AxisTensors = {module: {} for module in order}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            module, _, axis = name[len(prefix) :].rpartition("/")
            table.setdefault(module, {})[axis] = tensor
    return {module: axes for module, axes in table.items() if axes}


@dataclass(frozen=True)
class ScoreTable:
    """Scores of the rows and columns of a model's linear weights.

    Attributes:
        scores: module -> axis -> 1-D float32, one non-negative score per row ``(out_features,)`` or column
            ``(in_features,)``.
        weight_norm: L2 norm of the same rows and columns, to ask what a score says beyond the weight's size.
        provenance: where the scores come from.
        halves: the same scores from two disjoint halves of the data or of the perturbations; empty if there are none.
        noise: expected score of each row and column if there were no signal at all; empty where the score is exact.
    """

    _PREFIXES: ClassVar[tuple[str, ...]] = ("scores", "weight_norm", "noise", "halves/a", "halves/b")

    scores: AxisTensors
    weight_norm: AxisTensors
    provenance: Provenance
    halves: tuple[AxisTensors, AxisTensors] | tuple[()] = ()
    noise: AxisTensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise InputError("there are no scores in the table: score again")
        for table in (self.scores, self.weight_norm, self.noise, *self.halves):
            for module, axes in table.items():
                for axis, scores in axes.items():
                    size = self.provenance.shapes[module][AXES.index(axis)] if axis in AXES else -1
                    if scores.shape != (size,):
                        raise InputError(f"scores: {module!r} has no {size} scores of its {axis}s: score again")

    def save(self, path: Path) -> None:
        """Write ``scores.safetensors``."""
        tensors = _flatten("scores/", self.scores) | _flatten("weight_norm/", self.weight_norm)
        tensors |= _flatten("noise/", self.noise)
        for letter, half in zip("ab", self.halves, strict=False):
            tensors |= _flatten(f"halves/{letter}/", half)
        write_tensors(path, tensors, "scores", asdict(self.provenance))

    @classmethod
    def load(cls, path: Path) -> ScoreTable:
        """Read ``scores.safetensors``. Raises InputError if it is no such file."""
        tensors, header = read_tensors(path, "scores")
        fields = {name: header[name] for name in Provenance.__dataclass_fields__ if name in header}
        with _damage_named(path, "score again"):
            fields["shapes"] = {module: (int(shape[0]), int(shape[1])) for module, shape in fields["shapes"].items()}
            fields["sizes"] = {module: int(size) for module, size in fields.get("sizes", {}).items()}
            fields["layers"] = [str(layer) for layer in fields["layers"]]
            for name, kind in (("signal_to_noise", float), ("seconds", float), ("peak_memory", int)):
                fields[name] = None if fields.get(name) is None else kind(fields[name])
            provenance = Provenance(**fields)
        read = {prefix: _unflatten(f"{prefix}/", tensors, provenance.shapes) for prefix in cls._PREFIXES}
        halves = (read["halves/a"], read["halves/b"])
        with _damage_named(path, "score again"):
            return cls(read["scores"], read["weight_norm"], provenance, halves if all(halves) else (), read["noise"])


def _whole_numbers(values: Any) -> list[int]:
    if not all(type(value) is int for value in values):
        raise ValueError("indices must be whole numbers")
    return list(values)


@dataclass(frozen=True)
class Selection:
    """Which rows and columns are trained.

    Attributes:
        indices: module -> axis -> sorted, unique 1-D int64. Modules by their names in the unwrapped model.
        shapes: module -> ``(out_features, in_features)`` of every module in `indices`.
        model_fingerprint: of the model the indices belong to.
        origin: how the selection was made (criterion, budget, scope, …), for people.
        sizes: module -> number of its weights, where that is not ``out_features * in_features`` (convolutions).
    """

    indices: AxisTensors
    shapes: dict[str, tuple[int, int]]
    model_fingerprint: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module, size in self.sizes.items():
            if size < 1:
                raise InputError(f"selection: module {module!r} has {size} weights: mend it under 'sizes'")
        for module, axes in self.indices.items():
            if not isinstance(module, str) or not axes:
                raise InputError(f"selection: {module!r} trains nothing: give it 'row: [...]', or leave it out")
            if module not in self.shapes:
                raise InputError(f"selection: module {module!r} has indices but no shape: add it under 'shapes'")
            for axis, index in axes.items():
                if axis not in AXES:
                    raise InputError(f"selection: {module!r} has axis {axis!r}: use 'row' or 'column'")
                self._check_index(module, axis, index)

    def _check_index(self, module: str, axis: str, index: Tensor) -> None:
        size = self.shapes[module][AXES.index(axis)]
        if index.ndim != 1 or index.dtype.is_floating_point or index.numel() == 0:
            raise InputError(f"selection: {module!r} {axis} needs a non-empty list of whole numbers")
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise InputError(f"selection: {module!r} {axis} has an index outside 0..{size - 1}: remove it")
        if index.numel() > 1 and not bool((index[1:] > index[:-1]).all()):
            raise InputError(f"selection: {module!r} {axis} indices must be sorted and unique")

    def trainable_parameters(self) -> int:
        """How many weights are trained: of a linear layer a row has ``in_features``, a column ``out_features``."""
        return sum(
            index.numel() * _unit_cost(module, axis, self.shapes, self.sizes)
            for module, axes in self.indices.items()
            for axis, index in axes.items()
        )

    def save(self, path: Path) -> None:
        """Write ``selection.safetensors``, or YAML for people if the name ends in ``.yaml`` or ``.yml``."""
        header = {
            "model_fingerprint": self.model_fingerprint,
            "origin": self.origin,
            "shapes": {module: list(shape) for module, shape in self.shapes.items()},
        } | ({"sizes": self.sizes} if self.sizes else {})
        if path.suffix in (".yaml", ".yml"):
            rows = {
                module: {axis: index.tolist() for axis, index in axes.items()} for module, axes in self.indices.items()
            }
            write_yaml(path, {"format_version": FORMAT_VERSION, "kind": "selection", **header, "indices": rows})
        else:
            write_tensors(path, _flatten("", self.indices), "selection", header)

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read a selection from safetensors or YAML. Raises InputError if it is no such file."""
        import torch

        if path.suffix in (".yaml", ".yml"):
            header = read_yaml(path)
            if header.get("kind") != "selection":
                raise InputError(f"{path} is no selection ('kind: selection' is missing): name a selection file")
            _check_version(path, header.get("format_version"))
            try:
                indices = {
                    module: {axis: torch.tensor(_whole_numbers(values)) for axis, values in axes.items()}
                    for module, axes in header["indices"].items()
                }
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{path}: unreadable indices ({error}): write 'module: {{row: [0, 1]}}'") from None
        else:
            tensors, header = read_tensors(path, "selection")
            indices = _unflatten("", tensors, header.get("shapes", ()))
        try:
            shapes = {module: (int(shape[0]), int(shape[1])) for module, shape in header["shapes"].items()}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"{path}: unreadable shapes ({error}): write 'module: [out_features, in_features]'"
            ) from None
        with _damage_named(path, "select again"):
            origin = {str(name): str(value) for name, value in (header.get("origin") or {}).items()}
            sizes = {str(module): int(size) for module, size in (header.get("sizes") or {}).items()}
            return cls(indices, shapes, str(header.get("model_fingerprint") or ""), origin, sizes)


@dataclass(frozen=True)
class LayerScores:
    """One importance per decoder/encoder block; made from the scores of rows, by a probe, or while training.

    Attributes:
        scores: name of the block -> a finite, non-negative number, in the model's order.
        criterion: what made them, with its settings, e.g. ``rows:taylor``.
        model_source: hub id, folder or ``demo``.
        model_fingerprint: SHA-256 of the source checkpoint.
        data_source: dataset the scores were made on; empty for criteria without data.
        data_fingerprint: SHA-256 of the token ids and labels; empty for criteria without data.
        seed: of everything random in them.
        forward_passes: forward passes of one batch.
        backward_passes: backward passes of one batch.
        noise: block -> standard error of its score; empty where the score is exact.
    """

    scores: dict[str, float]
    criterion: str
    model_source: str = ""
    model_fingerprint: str = ""
    data_source: str = ""
    data_fingerprint: str = ""
    seed: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    noise: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise InputError("there are no layer scores: score the layers again")
        for layer, number in [*self.scores.items(), *self.noise.items()]:
            if layer not in self.scores or not (math.isfinite(number) and number >= 0):
                raise InputError(f"layer scores: {layer!r} has {number}: a layer has a finite number from 0 up")

    def save(self, path: Path) -> None:
        """Write ``layer_scores.json``."""
        write_json(path, {"kind": "layer_scores", **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> LayerScores:
        """Read ``layer_scores.json``. Raises InputError if it is no such file."""
        value = read_json(path)
        if value.get("kind") != "layer_scores":
            raise InputError(f"{path} holds no layer scores ('kind: layer_scores' is missing): name another file")
        with _damage_named(path, "score the layers again"):
            fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
            for name in ("scores", "noise"):
                fields[name] = {str(layer): float(number) for layer, number in fields.get(name, {}).items()}
            for name in ("seed", "forward_passes", "backward_passes"):
                fields[name] = int(fields.get(name, 0))
            return cls(**fields)
