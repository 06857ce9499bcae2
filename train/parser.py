"""The flags of the trainer: DeiT's names and defaults, and those that are new."""

import argparse
from pathlib import Path

from tokenmix_kernels.settings import ERASE_MODES

from .mixers import EVIDENCE, MIXERS, attention_ratio
from .values import DATA, TIMM_DATA, data_name, json_object

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the trainer."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def build_parser() -> argparse.ArgumentParser:
    """The parser with the defaults of DeiT's main.py; a recipe overrides them, the command line both."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a timm model with TokenMix. Start with: python -m train --recipe demo",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    yes_no = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    group.add_argument("--recipe", metavar="NAME|FILE", help=f"defaults from {', '.join(recipe_names())} or a .json")
    group.add_argument("--output", default=None, metavar="DIR", help="where everything is written (default: runs/NAME)")
    group.add_argument(
        "--resume",
        default=None,
        metavar="auto|FILE",
        help="continue from a checkpoint, bit-exactly on the same number of processes, with the same images in every "
        "update on another one; auto: the last of --output, if there is one",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="also write a checkpoint every so many steps within an epoch; 0: at epoch ends only",
    )
    group.add_argument(
        "--save-epochs",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="write the checkpoint after every so many epochs, after those that are evaluated, and after the last",
    )
    group.add_argument("--keep-best", action=yes_no, default=True, help="keep best.pt, by top-1 on the validation set")
    group.add_argument(
        "--init-from",
        metavar="FILE",
        help="start from the weights of this checkpoint or .safetensors file (DeiT's --finetune)",
    )
    group.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate the weights of --resume, a checkpoint (whose model and data it takes where no flag says "
        "otherwise) or a .safetensors file",
    )
    group.add_argument("--replay", metavar="FILE", help="run the step of a saved nonfinite-*.pt file again")
    group.add_argument(
        "--profile-mixers",
        action="store_true",
        help="time the same steps with each mixer, interleaved, instead of training",
    )
    group.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and mixing")
    group.add_argument("--device", default="auto", help="auto (cuda or cpu), cpu, cuda, cuda:1, mps, xpu, xpu:1")
    group.add_argument("--threads", type=int, default=0, help="CPU threads for torch; 0: leave as they are")
    group.add_argument(
        "--log-every",
        type=int,
        default=20,
        metavar="STEPS",
        help="read losses and times from the device every so many steps",
    )
    group.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS", help="and always after the last epoch")
    group.add_argument(
        "--max-steps",
        type=int,
        default=0,
        help="end every epoch after so many steps (for trying things out); 0: whole epochs",
    )
    group.add_argument("--picture", action=yes_no, default=True, help="write mix.png at the end")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to --output")
    group.add_argument(
        "--log-wandb", action="store_true", help="also write to Weights & Biases; WANDB_MODE=offline too"
    )
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="of W&B (default: that of your account)")
    group.add_argument("--wandb-name", default=None, metavar="NAME", help="of the W&B run (default: that of --output)")
    group.add_argument("--wandb-tags", default=[], nargs="+", metavar="TAG", help="of the W&B run")
    group.add_argument(
        "--wandb-resume-id",
        default=None,
        metavar="ID",
        help="of a W&B run to go on with (default: that of the checkpoint --resume, else a new one)",
    )
    group.add_argument("--traceback", action="store_true", help="show the traceback of input errors")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="deit_small_patch16_224", help="name of a timm model")
    group.add_argument(
        "--model-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help='more arguments for timm.create_model, as {"depth": 6}',
    )
    group.add_argument("--input-size", type=int, default=224, help="side of the training images in pixels")
    group.add_argument("--patch-size", type=int, default=0, help="side of a token in pixels; 0: the model's own")
    group.add_argument("--drop", type=float, default=0.0, help="dropout rate")
    group.add_argument("--drop-path", type=float, default=0.1, help="drop path rate")
    group.add_argument("--model-ema", action=yes_no, default=True, help="keep an average of the weights beside them")
    group.add_argument("--model-ema-decay", type=float, default=0.99996)
    group.add_argument(
        "--model-ema-warmup",
        action=yes_no,
        default=False,
        help="let the decay grow from 0, for runs too short for a long average",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--channels-last", action="store_true")
    group.add_argument("--amp", action=yes_no, default=None, help="bf16 autocast (default: on CUDA devices)")

    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch-size", type=int, default=128, help="images per process and step")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="STEPS", help="steps whose gradients are averaged into one update"
    )
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument("--opt", default="adamw", help="name of a timm optimiser")
    group.add_argument("--opt-eps", type=float, default=1e-8)
    group.add_argument("--opt-betas", type=float, nargs=2, default=None)
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--clip-grad", type=float, default=None, metavar="NORM", help="largest norm of the gradient")
    group.add_argument("--lr", type=float, default=5e-4, help="learning rate per 512 images of an update")
    group.add_argument("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch")
    group.add_argument("--sched", default="cosine", help="name of a timm scheduler")
    group.add_argument(
        "--sched-on-updates",
        action=yes_no,
        default=False,
        help="move the learning rate at every update (default: every epoch, as DeiT does)",
    )
    group.add_argument("--warmup-epochs", type=int, default=5)
    group.add_argument("--warmup-lr", type=float, default=1e-6)
    group.add_argument("--min-lr", type=float, default=1e-5)
    group.add_argument("--cooldown-epochs", type=int, default=0)
    group.add_argument(
        "--bce-loss",
        action=yes_no,
        default=True,
        help="binary cross entropy, as in the paper; else soft-target cross entropy",
    )

    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--mixer",
        choices=list(MIXERS),
        default="tokenmix",
        help="a mask rule with the evidence, loss and numbers of its paper; transmix and mixpro set --evidence "
        "attention, --no-bce-loss, --mixup, --cutmix, --mixup-switch-prob and --smoothing where you do not",
    )
    group.add_argument("--mask-type", choices=["block", "random", "grid"], default="block", help="of tokenmix")
    group.add_argument(
        "--grid-cell",
        type=int,
        metavar="TOKENS",
        help="side of a cell of mixpro's grid masks (default: 4; 2 where the grid has fewer than 12 tokens a side)",
    )
    group.add_argument(
        "--minimum-tokens",
        type=int,
        help="of tokenmix: tokens masked beside half of them (default: a 14th, so 14 of 14x14)",
    )
    group.add_argument(
        "--mixup",
        type=float,
        default=0.8,
        metavar="ALPHA",
        help="DeiT's mixup branch beside tokenmix or in mixup; 0: off",
    )
    group.add_argument("--cutmix", type=float, default=1.0, metavar="ALPHA", help="of the token or box branch")
    group.add_argument("--cutmix-minmax", type=float, nargs=2, default=None)
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of mixing at all")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="of tokens rather than mixup")
    group.add_argument("--mixup-mode", choices=["batch", "pair", "elem"], default="batch")
    group.add_argument(
        "--mixup-off-epoch",
        type=int,
        default=0,
        metavar="EPOCH",
        help="from this epoch on (counted from 0) images are not mixed, labels smoothed only; 0: mix to the end",
    )
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")

    group = parser.add_argument_group("evidence (what the targets follow)")
    group.add_argument(
        "--evidence",
        choices=EVIDENCE,
        help="attention: the class token's attention in the model that is trained, no teacher needed; teacher: "
        "activation maps that --teacher makes; maps: those of the bank --maps FILE; area: none (default: the mixer's, "
        "else as --maps and --teacher say)",
    )
    group.add_argument(
        "--attention-ratio",
        type=attention_ratio,
        metavar="SHARE|progressive",
        help="of the attention in the weights, the rest is the area's; progressive: as far as the prediction agrees "
        "with the area's targets (default: the mixer's paper's, progressive for mixpro, else 0.5)",
    )
    group.add_argument(
        "--maps",
        default=None,
        metavar="FILE|area",
        help="a map bank, or area for area shares; with --evidence attention the bank is for the picture only "
        "(default: made by --teacher, or area without one)",
    )
    group.add_argument("--teacher", default=None, metavar="NAME", help="timm model whose activation maps are used")
    group.add_argument(
        "--teacher-weights",
        default=None,
        metavar="FILE",
        help="its weights; its head must have the classes of the data unless --probe",
    )
    group.add_argument(
        "--probe",
        action=yes_no,
        default=None,
        help="fit the teacher's last layer on the training set first (default: for elpv and CIFAR)",
    )
    group.add_argument(
        "--online", action="store_true", help="run the teacher on every crop instead of once on every source image"
    )
    group.add_argument("--teacher-size", type=int, default=0, help="side of its input; 0: the model's own")
    group.add_argument("--cache", default=None, metavar="DIR", help="where maps are kept (default: runs/cache)")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=data_name,
        default="imagefolder",
        metavar="NAME",
        help=f"{', '.join(DATA)}, or timm: and what timm.data.create_dataset reads: {', '.join(TIMM_DATA)}",
    )
    group.add_argument(
        "--data-path",
        default=None,
        metavar="DIR",
        help="folder with train/ and val/ (imagefolder, timm:folder), of the CIFAR files (downloaded if missing), of "
        "the shards (wds; a URL too), of the prepared data (tfds) or of the cache (hfds, hfids)",
    )
    group.add_argument("--train-split", default="train", metavar="SPLIT", help="of timm: data, as timm writes splits")
    group.add_argument("--val-split", default="validation", metavar="SPLIT", help="of timm: data")
    group.add_argument(
        "--num-classes",
        type=int,
        default=None,
        help="of timm: data; needed where the reader knows no class names (wds)",
    )
    group.add_argument(
        "--train-num-samples", type=int, default=None, help="of timm: streams that do not tell (wds without _info.json)"
    )
    group.add_argument("--val-num-samples", type=int, default=None, help="the same of the validation split")
    group.add_argument(
        "--data-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help='more arguments for timm.data.create_dataset, as {"input_key": "img"} or {"download": true}',
    )
    group.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read and count them at the end (default: stop and name the file)",
    )
    group.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="validate on this share of the training images of each class, which are then not trained on, and leave "
        "the validation split alone",
    )
    group.add_argument(
        "--label-fraction",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="train on this share of the images of each class only, chosen by --seed",
    )
    group.add_argument(
        "--in-memory",
        type=int,
        default=None,
        metavar="PIXELS",
        help="read every image once, shrink it to so many pixels at its shorter side, and keep it in the memory of "
        "each loader process, for small data sets; crops are cut from the kept image (default: read anew every time)",
    )
    group.add_argument(
        "--shift-crops",
        action=yes_no,
        default=False,
        help="weak augmentation at next to no cost: a crop of --input-size pixels of the kept image as they are, at a "
        "random place and flipped as --hflip says; needs --in-memory",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=10,
        help="loader processes per process; 0: none (a stream has at least one, and its order depends on how many)",
    )
    group.add_argument("--repeated-aug", action=yes_no, default=True, help="each image three times, as DeiT")
    group.add_argument("--color-jitter", type=float, default=0.3)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy as timm writes it; none: off")
    group.add_argument("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of the random crop")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--train-interpolation", default="bicubic")
    group.add_argument(
        "--reprob",
        type=float,
        default=0.25,
        help="probability of random erasing, in the launch that mixes: of each image before it is mixed, normalised",
    )
    group.add_argument("--remode", choices=ERASE_MODES, default="pixel", help="what erased pixels become, as in timm")
    group.add_argument("--recount", type=int, default=1, metavar="COUNT", help="rectangles that are erased, at most")
    group.add_argument("--eval-crop-ratio", type=float, default=0.875)
    return parser
