"""`python -m tokenmix_kernels.maps`: build, resume, convert, inspect, and what it says when it cannot."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")
functional = pytest.importorskip("torchvision.transforms.functional", reason="needs the extra 'maps'")

from PIL import Image  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

from tokenmix_kernels.maps.teacher import ActivationTeacher, load_teacher  # noqa: E402
from tokenmix_kernels.maps.bank import MapBank, dataset_digest  # noqa: E402
from tokenmix_kernels.maps import folder_digest  # noqa: E402
from tokenmix_kernels.maps.__main__ import main  # noqa: E402

SIZE = (96, 128)  # gives maps of 3x4
# Threads that wait for each other spin, and tests often run on a machine that has other work.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_images(root, classes, count, seed=0):
    generator = np.random.default_rng(seed)
    for number in range(count):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(20, 60, 2)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        image = image.convert("L") if number % 5 == 0 else image
        image.save(folder / f"image{number}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), ["a cat", "dog"], 23)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=2)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return path


def build_arguments(data, weights, out, **options):
    arguments = ["build", str(data), "--model", "test_resnet", "--weights", str(weights), "--out", str(out)]
    arguments += ["--size", str(SIZE[0]), str(SIZE[1])]
    options = {"workers": 0, "batch-size": 4, **options}
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def expect_error(capsys, arguments, says):
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert error.splitlines()[-1].startswith("error: ")


def test_build(data, weights, tmp_path, capsys):
    out = tmp_path / "train.bank"
    assert main(build_arguments(data, weights, out, workers=1)) == 0
    printed = capsys.readouterr()
    assert "23 maps of 3x4" in printed.out and "23 of them new" in printed.out
    assert "23/23" in printed.err  # the progress bar

    folder = ImageFolder(str(data))
    labels = [label for _, label in folder.samples]
    bank = MapBank.open(out)
    bank.check(count=23, labels=labels, digest=folder_digest(folder))
    names = [os.path.relpath(path, data) for path, _ in folder.samples]
    assert bank.digest == dataset_digest(names, labels)
    assert bank.teacher == "test_resnet (cam, 96x128 px, teacher.pth)"

    # Independently: one image at a time, the whole image resized.
    teacher = ActivationTeacher(load_teacher("test_resnet", weights))
    interpolation = functional.InterpolationMode(teacher.model.pretrained_cfg["interpolation"])
    assert (bank.scales > 0).sum() > 10
    for number, (path, label) in enumerate(folder.samples):
        image = Image.open(path).convert("RGB")
        assert bank.sizes[number].tolist() == [image.height, image.width]
        pixels = functional.pil_to_tensor(functional.resize(image, SIZE, interpolation))
        expected = teacher(pixels[None], torch.tensor([label]))[0]
        found = bank.maps(torch.tensor([number]))[0]
        tolerance = float(expected.max()) * 0.5 / 255 + 1e-5
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def wait_for_maps(partial, count, process):
    """Until `count` maps are recorded in the unfinished bank, as any reader sees it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            MapBank.open(partial)
        except FileNotFoundError:
            pass
        except ValueError as error:
            if int(re.search(r"(\d+) of \d+ maps are in", str(error))[1]) >= count:
                return
        time.sleep(0.002)
    pytest.fail(f"the build ended or hung before {count} maps were recorded")


def kill_with_children(process):
    """kill -9 of torchrun and, because it gives them sessions of their own, of each of its workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.01)  # until they are gone, or zombies


def test_killed_builds_go_on_with_nothing_lost_or_doubled(weights, tmp_path, capsys):
    """kill -9 of a build by two processes under torchrun; then by one alone; then finished by one."""
    count = 600
    data = make_images(tmp_path / "images", ["a", "b"], count)
    out, partial = tmp_path / "train.bank", tmp_path / "train.bank.partial"
    options = {"batch-size": 2, "save-every": 0.02}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, least in ((torchrun, 40), ([sys.executable], 240)):
        command = [*start, "-m", "tokenmix_kernels.maps", *build_arguments(data, weights, out, **options)]
        process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_maps(partial, least, process)
        finally:
            kill_with_children(process)
        assert partial.exists() and not out.exists()
        with pytest.raises(FileNotFoundError, match=r"train\.bank is not finished"):
            MapBank.open(out)
        scales = np.fromfile(partial, "<f4", count, offset=4096 + 2 * 4096)  # 600 * 12 bytes of values before it
        done = int((~np.isnan(scales)).sum())
        assert least <= done < count
        if start is torchrun:  # both had begun their share, at 0 and at 300
            assert not np.isnan(scales[[0, 300]]).any()

    assert main(build_arguments(data, weights, out)) == 0
    printed = capsys.readouterr().out
    assert f"{done} of {count} maps are there already" in printed
    assert f"{count - done} of them new" in printed
    assert main(build_arguments(data, weights, tmp_path / "once.bank")) == 0
    resumed, once = MapBank.open(out), MapBank.open(tmp_path / "once.bank")
    resumed.verify()
    assert torch.equal(resumed.sizes, once.sizes) and torch.equal(resumed.labels, once.labels)
    ids = torch.arange(count)
    # Batches fall differently after a resume, which may move the teacher's last bits.
    torch.testing.assert_close(resumed.maps(ids), once.maps(ids), rtol=1e-2, atol=float(once.scales.max()))


def test_torchrun_builds_a_whole_bank(data, weights, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tokenmix_kernels.maps"]
    out = tmp_path / "train.bank"
    process = subprocess.run(
        command + build_arguments(data, weights, out),
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("23 maps of 3x4") == 1 and "process 1 of 2" in process.stderr
    assert main(build_arguments(data, weights, tmp_path / "once.bank")) == 0
    shared, once = MapBank.open(out), MapBank.open(tmp_path / "once.bank")
    ids = torch.arange(23)
    torch.testing.assert_close(shared.maps(ids), once.maps(ids), rtol=1e-2, atol=float(once.scales.max()))
    assert torch.equal(shared.sizes, once.sizes)


def test_folders_of_imagenet_get_the_classes_of_imagenet(tmp_path, capsys):
    """Two of ImageNet's folders and a teacher of its 1000 classes: goldfish is 1, coffee mug 504."""
    data = make_images(tmp_path / "images", ["n01443537", "n03063599"], 4)
    torch.manual_seed(0)
    weights = tmp_path / "teacher.pth"
    model = timm.create_model("test_resnet", pretrained=False)
    torch.nn.init.normal_(model.fc.weight, std=0.3)
    torch.nn.init.constant_(model.fc.bias, 3.0)
    torch.save(model.state_dict(), weights)
    arguments = build_arguments(data, weights, tmp_path / "a.bank")
    assert main(arguments) == 0
    teacher = ActivationTeacher(load_teacher("test_resnet", weights))
    pixels = functional.pil_to_tensor(
        functional.resize(Image.open(data / "n03063599" / "image1.png").convert("RGB"), SIZE,
                          functional.InterpolationMode(teacher.model.pretrained_cfg["interpolation"]))
    )  # fmt: skip
    bank = MapBank.open(tmp_path / "a.bank")
    assert bank.labels.tolist() == [0, 0, 1, 1]

    def error(number, label):
        expected = teacher(pixels[None], torch.tensor([label]))[0]
        return float((bank.maps(torch.tensor([number]))[0] - expected).abs().max() / expected.max())

    assert error(2, 504) < 0.01 < error(2, 1)

    other = tmp_path / "map.txt"
    other.write_text("n01443537 3\n\nn03063599 1\n")
    assert main([*arguments[:-1], "4", "--class-map", str(other), "--out", str(tmp_path / "b.bank")]) == 0
    bank = MapBank.open(tmp_path / "b.bank")
    assert error(2, 1) < 0.01 < error(2, 504)
    for text, says in [
        ("n01443537 3\n", "no line for 1 folders, the first is n03063599"),
        ("n01443537 3\nn03063599 1000\n", "names class 1000, the teacher has 1000"),
        ("n01443537\n", "line 1 must be 'folder index'"),
    ]:
        other.write_text(text)
        expect_error(capsys, [*arguments, "--class-map", other, "--out", tmp_path / "c.bank"], says)
    (data / "n03063599").rename(data / "mugs")
    expect_error(capsys, [*arguments, "--out", tmp_path / "c.bank"], "2 classes but the teacher 1000.*--class-map")


def test_build_says_what_is_wrong(data, weights, tmp_path, capsys):
    out = tmp_path / "a.bank"
    good = build_arguments(data, weights, out)
    expect_error(capsys, build_arguments(tmp_path / "absent", weights, out), "there is no folder .*absent")
    expect_error(capsys, build_arguments(tmp_path, weights, out), "must hold one folder of images per class")
    expect_error(capsys, [*good, "--model", "resnet_10"], "timm knows no model 'resnet_10'; did you mean")
    expect_error(capsys, [*good, "--weights", tmp_path / "no.pth"], "no weights file .*no.pth")
    expect_error(capsys, [*good, "--method", "attention"], "needs a vision transformer")
    expect_error(capsys, [*good, "--size", 64, 64, 64], "--size must be a side or height and width")
    expect_error(capsys, [*good, "--mean", 0.5, 0.5], "--mean must be one number or three, not 2")
    assert not list(tmp_path.iterdir())
    assert main(good) == 0
    expect_error(capsys, good, "a.bank exists already: delete it or give another --out")


def test_build_with_a_vision_transformer_at_another_size(data, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    arguments = build_arguments(data, tmp_path / "vit.pth", tmp_path / "a.bank")
    arguments[arguments.index("test_resnet")] = "test_vit"
    expect_error(capsys, [*arguments, "--size", 100], "multiples of the patch size 16x16 of test_vit, not 100x100")
    assert main([*arguments, "--size", "64", "96"]) == 0
    bank = MapBank.open(tmp_path / "a.bank")
    assert bank.grid == (4, 6) and bank.teacher.startswith("test_vit (attention, 64x96 px")
    shares = bank.maps(torch.arange(23)).sum((1, 2))
    assert ((shares > 0.5) & (shares < 1.0)).all()  # the class token keeps the rest of its attention


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_the_rest_is_kept(weights, tmp_path, capsys, workers):
    data = make_images(tmp_path / "images", ["a", "b"], 12)
    broken = data / "b" / "image7.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    arguments = build_arguments(data, weights, tmp_path / "a.bank", workers=workers)
    expect_error(capsys, arguments, rf"error: the image {broken} cannot be read: ")
    broken.write_bytes(content)
    assert main(arguments) == 0
    # b/image7 is the tenth of the sorted list: two batches of four before its own were kept.
    assert "8 of 12 maps are there already" in capsys.readouterr().out


def test_another_teacher_does_not_go_on_with_the_bank(data, weights, tmp_path, capsys):
    broken = make_images(tmp_path / "images", ["a", "b"], 6)
    (broken / "b" / "image5.png").write_bytes(b"")
    arguments = build_arguments(broken, weights, tmp_path / "a.bank")
    assert main(arguments) == 1
    expect_error(capsys, [*arguments, "--size", 96], "beginning of another bank")


def label_map(own, label, k=3, seed=0):
    """[2, k, h, w] as TokenLabeling stores it: the own label's values in changing places among the top k."""
    generator = torch.Generator().manual_seed(seed)
    h, w = own.shape
    values = torch.randn(k, h, w, generator=generator)
    others = [c for c in range(10) if c != label]
    indices = torch.tensor(others)[torch.rand(k, h, w, len(others), generator=generator).argmax(-1)]
    place = torch.randint(k, (h, w), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    there = own != 0  # a zero stands for a position where the label is not among the top k
    values[place[there], rows[there], columns[there]] = own[there]
    indices[place[there], rows[there], columns[there]] = label
    return torch.stack([values.half(), indices.half()])


@pytest.fixture
def label_maps(tmp_path):
    """A data set, its label maps and the own-label maps that are in them."""
    data = make_images(tmp_path / "images", ["a", "b", "c"], 9)
    (data / "c" / "image2.png").rename(data / "c" / "image2.with.dots.png")
    root = tmp_path / "labels"
    expected = []
    for number, (path, label) in enumerate(ImageFolder(str(data)).samples):
        own = torch.randn(6, 5, generator=torch.Generator().manual_seed(100 + number)).half().float()
        own[0, :3] = 0
        if number == 4:
            own.zero_()
        target = root / os.path.basename(os.path.dirname(path)) / (os.path.basename(path).split(".")[0] + ".pt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(label_map(own, label, seed=number), target)
        expected.append(own.clamp(min=0))
    return data, root, torch.stack(expected)


def test_convert(label_maps, tmp_path, capsys):
    data, root, expected = label_maps
    out = tmp_path / "c.bank"
    arguments = ["convert", str(root), "--data", str(data), "--out", str(out), "--workers", "0"]
    assert main([*arguments, "--batch-size", "4", "--teacher", "nfnet"]) == 0
    assert "9 maps of 6x5" in capsys.readouterr().out
    bank = MapBank.open(out)
    bank.check(digest=folder_digest(ImageFolder(str(data))))
    assert bank.teacher == "nfnet (label maps, whole)"
    found = bank.maps(torch.arange(9))
    tolerance = expected.amax((1, 2), keepdim=True) * 0.5 / 255 + 1e-6
    assert ((found - expected).abs() <= tolerance).all()
    assert found[4].eq(0).all() and (expected.amax((1, 2)) > 0).sum() == 8


def test_convert_of_maps_of_the_centre_square(tmp_path):
    """A wide image: its outer columns are not covered, the inner ones show the map at half the width."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "a" / "x.png")
    (tmp_path / "labels" / "a").mkdir(parents=True)
    own = torch.ones(8, 8) * torch.tensor([1.0, 1, 1, 1, 3, 3, 3, 3])
    torch.save(torch.stack([own, torch.zeros(8, 8)])[:, None], tmp_path / "labels" / "a" / "x.pt")
    arguments = ["convert", tmp_path / "labels", "--data", tmp_path / "images", "--region", "centre"]
    arguments += ["--out", tmp_path / "d.bank", "--workers", "0"]
    assert main([str(argument) for argument in arguments]) == 0
    found = MapBank.open(tmp_path / "d.bank").maps(torch.tensor([0]))[0]
    # The square covers columns 2 to 5; bilinear between its columns 0|1, 2|3, 4|5, 6|7.
    expected = torch.tensor([0.0, 0, 1, 1, 3, 3, 0, 0]).expand(8, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (None, "there is no label map .*image3.pt for the image .*image3.png"),
        (b"rubbish", "label map .*image3.pt cannot be read"),
        (torch.zeros(3, 4, 6, 5), r"image3.pt must be \[2, k, h, w\].* not \[3, 4, 6, 5\]"),
        ({"values": torch.zeros(2, 3, 6, 5)}, "image3.pt must be .* not dict"),
        (torch.full((2, 3, 6, 5), float("nan")), "image3.pt has NaN"),
        (torch.zeros(2, 3, 7, 5), "image3.pt is of 7x5, that of the first image of 6x5"),
    ],
    ids=["missing", "rubbish", "shape", "dict", "nan", "grid"],
)
def test_convert_names_the_file(label_maps, tmp_path, capsys, entry, says):
    data, root, _ = label_maps
    path = root / "a" / "image3.pt"
    path.unlink()
    if isinstance(entry, bytes):
        path.write_bytes(entry)
    elif entry is not None:
        torch.save(entry, path)
    arguments = ["convert", root, "--data", data, "--out", tmp_path / "e.bank", "--workers", 0]
    expect_error(capsys, arguments, says)
    assert not (tmp_path / "e.bank").exists()


def test_convert_refuses_class_ids_that_half_precision_cannot_tell_apart(label_maps, tmp_path, capsys):
    data, root, _ = label_maps
    other = tmp_path / "map.txt"
    other.write_text("a 0\nb 1\nc 2049\n")
    arguments = ["convert", root, "--data", data, "--out", tmp_path / "f.bank", "--workers", 0]
    expect_error(capsys, [*arguments, "--class-map", other], "class ids as torch.float16, too coarse for 2049")


def test_inspect(data, weights, tmp_path, capsys):
    out = tmp_path / "train.bank"
    assert main(build_arguments(data, weights, out)) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--data", str(data), "--verify", "--count", "5"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "23 of 3x4",
        "test_resnet (cam",
        MapBank.open(out).digest,
        "correct",
        "is the data set of the bank",
    ):
        assert part in printed
    picture = np.asarray(Image.open(tmp_path / "train.bank.png").convert("RGB"))
    # Five images and five overlays: coloured, not a white page.
    assert picture.shape[1] > 2 * picture.shape[0] and (picture != 255).any(2).mean() > 0.2

    assert main(["inspect", str(out), "--ids", "22", "0", "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    expect_error(capsys, ["inspect", out, "--ids", 23], r"ids must lie in \[0, 23\)")
    other = make_images(tmp_path / "other", ["a cat", "dog"], 22)
    expect_error(capsys, ["inspect", out, "--data", other], "holds 23 maps, the data set has 22 images")
    expect_error(capsys, ["inspect", tmp_path / "absent.bank"], "absent.bank")
    (tmp_path / "foreign.bank").write_bytes(b"x" * 10000)
    expect_error(capsys, ["inspect", tmp_path / "foreign.bank"], "foreign.bank is not a map bank")
    content = bytearray(out.read_bytes())
    content[4100] ^= 255
    out.write_bytes(content)
    expect_error(capsys, ["inspect", out, "--verify"], "is damaged: checksum")


def test_the_digest_does_not_depend_on_where_the_data_lies(data, tmp_path):
    moved = tmp_path / "elsewhere"
    os.symlink(data, moved)
    assert folder_digest(ImageFolder(str(moved))) == folder_digest(ImageFolder(str(data)))


@pytest.mark.parametrize("library", ["timm", "torchvision", "tqdm"])
def test_a_missing_library_is_named_with_its_extra(data, weights, tmp_path, capsys, monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    expect_error(
        capsys,
        build_arguments(data, weights, tmp_path / "a.bank"),
        rf"error: {library} is needed for this and is not installed: pip install 'tokenmix_kernels\[maps\]'",
    )


def test_base_install_needs_none_of_the_extras():
    script = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'tqdm', 'matplotlib', 'PIL', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import tokenmix_kernels\n"
        "from tokenmix_kernels import activation, bank, maps, transforms\n"
        "try:\n"
        "    transforms.tracked_transform(32)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=ONE_THREAD, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    assert "pip install 'tokenmix_kernels[maps]'" in process.stdout
