from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.__main__ import main
from trainer.config import RunConfig, UserError, flatten, nearest, override
from trainer.recipes import RECIPES, recipe
from trainer.sections import MemoryConfig

# What the papers and the official repositories publish: https://arxiv.org/abs/2311.17132 (its
# appendix on ImageNet-1k training) and https://arxiv.org/abs/2310.19380 (section 4.1).
BOTH = {
    "train.batch_size": 1024,
    "train.label_smoothing": 0.1,
    "model.num_classes": 1000,
    "optim.min_lr": 1e-5,
    "optim.warmup_lr": 1e-6,
    "optim.warmup_epochs": 5.0,
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "data.auto_augment": "rand-m9-mstd0.5-inc1",
    "data.hflip": 0.5,
    "data.mixup": 0.8,
    "data.cutmix": 1.0,
    "data.mix_switch_prob": 0.5,
    "data.erase_prob": 0.25,
    "data.crop_scale": (0.08, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3),
}
TRANSNEXT = {
    **BOTH,
    "model.img_size": 224,
    "train.epochs": 300,
    "train.ema_decay": 0.0,
    "train.seed": 0,
    "optim.lr": 1e-3,
    "optim.cooldown_epochs": 0,
    "optim.clip_grad": 1.0,
    "data.interpolation": "bicubic",
    "data.repeats": 3,
    "eval.crop_pct": 224 / 256,
}
TRANSXNET = {
    **BOTH,
    "model.img_size": 224,
    "train.epochs": 310,
    "train.seed": 42,
    "optim.lr": 2e-3,
    "optim.cooldown_epochs": 10,
    "optim.clip_grad": None,
    "data.interpolation": "random",
    "data.repeats": 1,
}
PUBLISHED = {
    "transnext_micro": TRANSNEXT | {"model.drop_path": 0.15},
    "transnext_tiny": TRANSNEXT | {"model.drop_path": 0.25},
    "transnext_small": TRANSNEXT | {"model.drop_path": 0.45},
    "transnext_base": TRANSNEXT | {"model.drop_path": 0.6},
    "transnext_micro_AAAA": TRANSNEXT | {"model.drop_path": 0.15, "model.img_size": 256},
    "transxnet_t": TRANSXNET
    | {"model.drop_path": 0.1, "train.ema_decay": 0.9998, "eval.crop_pct": 0.9},
    "transxnet_s": TRANSXNET
    | {"model.drop_path": 0.2, "train.ema_decay": 0.99985, "eval.crop_pct": 0.9},
    "transxnet_b": TRANSXNET
    | {"model.drop_path": 0.4, "train.ema_decay": 0.99985, "eval.crop_pct": 0.95},
}


LARGEST = {"transnext": "transnext_base", "transxnet": "transxnet_b"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one(name):
    values = dict(flatten(recipe(name)))
    assert {setting: values[setting] for setting in PUBLISHED[name]} == PUBLISHED[name]
    assert values["recipe"] == values["model.name"] == name
    assert values["run_dir"] == f"runs/{name}"


LARGER = {
    "transnext_large": (None, 0.0),
    "transnext_huge": (1e-5, 1e-4),
    "transnext_giant": (1e-5, 1e-4),
    "transxnet_large": (None, 0.0),
    "transxnet_huge": (None, 1e-4),
}


@pytest.mark.parametrize("name", LARGER)
def test_a_larger_recipe_is_the_family_s_and_stabilised_from_half_a_billion_on(name):
    values, largest = dict(flatten(recipe(name))), LARGEST[name.split("_")[0]]
    assert (values["model.layer_scale"], values["train.z_loss"]) == LARGER[name]
    own = {"recipe", "run_dir", "model.name", "model.drop_path", "model.layer_scale"}
    own |= {"train.z_loss", "backend.name", "memory.checkpointing"}
    for setting, value in flatten(recipe(largest)):
        assert setting in own or values[setting] == value


def test_every_recipe_is_accounted_for():
    assert set(RECIPES) == {*PUBLISHED, *LARGER, "demo"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name):
    assert recipe(name).validate() == []


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(
        UserError, match=r"unknown recipe transnext_bas; did you mean transnext_base"
    ):
        recipe("transnext_bas")


def test_overrides_change_exactly_what_they_name():
    config = override(
        recipe("transnext_base"),
        [
            *("--optim.lr", "2e-3", "--train.accumulate=4", "--data.crop_scale", "0.2", "1"),
            *("--optim.clip-grad", "None", "--memory.compile", "--checkpoint.no-async-save"),
        ],
    )
    assert dict(flatten(config)) == dict(flatten(recipe("transnext_base"))) | {
        "data.crop_scale": (0.2, 1.0),
        "train.accumulate": 4,
        "optim.lr": 2e-3,
        "optim.clip_grad": None,
        "memory.compile": True,
        "checkpoint.async_save": False,
    }


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "did you mean --optim.lr?"]),
        (["--optim.wieght-decay", "1"], ["did you mean --optim.weight-decay?"]),
        (["--lr", "1"], ["unknown option --lr"]),
        (["--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (["--optim.lr"], ["--optim.lr"]),
        (["--train.epochs", "2.5"], ["--train.epochs", "'2.5'"]),
        (["--train.precision", "fp64"], ["--train.precision", "fp64", "bf16"]),
        (["--data.crop-scale", "0.2"], ["--data.crop-scale"]),
        (["--memory.checkpointing", "5"], ["memory.checkpointing is '5'", "none, full"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_bad_override_is_one_line(arguments, parts, capfd):
    with pytest.raises(UserError) as error:
        override(recipe("demo"), arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["train.batch-size", "data.lanes", "data.window"])
@pytest.mark.parametrize("value", ["0", "-4"])
def test_sizes_must_be_above_zero(name, value):
    with pytest.raises(UserError, match=f"{name.replace('-', '_')} is {value}: it must be above 0"):
        override(recipe("demo"), [f"--{name}", value])


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as error:
        override(
            recipe("demo"),
            [
                *("--optim.lr", "0", "--model.drop-path", "1.5", "--optim.weight-decay", "-1"),
                *("--train.batch-size", "100", "--train.accumulate", "3"),
                *("--optim.warmup-epochs", "9", "--data.crop-ratio", "2", "1"),
                *("--memory.checkpointing", "some"),
            ],
        )
    problems = str(error.value).split("; ")
    assert len(problems) == 7
    for name in (
        *("optim.lr", "model.drop_path", "optim.weight_decay", "train.batch_size"),
        *("optim.warmup_epochs", "data.crop_ratio", "memory.checkpointing"),
    ):
        assert sum(problem.startswith(f"{name} ") for problem in problems) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optim.warmup-epochs", "0", "--optim.cooldown-epochs", "2"], "all of train.epochs"),
        (["--optim.betas", "0.9", "1.0"], "optim.betas is (0.9, 1.0): both must be at least 0"),
        (["--data.std", "0", "1", "1"], "data.std is (0.0, 1.0, 1.0): deviations must be above 0"),
        (["--eval.crop-pct", "0"], "eval.crop_pct is 0.0: it must be above 0"),
        (["--model.pretrain-size", "0"], "model.pretrain_size is 0: it must be above 0"),
        (["--optim.weight-decay", "nan"], "optim.weight_decay is nan: it must be finite"),
        (["--optim.lr", "inf"], "optim.lr is inf: it must be finite"),
        (["--data.mean", "0", "nan", "0"], "data.mean is (0.0, nan, 0.0): it must be finite"),
        (["--data.crop-scale", "0.5", "inf"], "data.crop_scale is (0.5, inf): it must be finite"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(arguments, said):
    with pytest.raises(UserError) as error:
        override(recipe("demo"), arguments)
    assert said in str(error.value)
    assert "; " not in str(error.value), "once"


OFFLOADED = ("--backend.name", "zero3", "--backend.offload", "optimizer")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend.offload", "optimizer"], "fsdp does not know: use backend.name zero1, zero2"),
        (["--backend.name", "zero2", "--backend.offload", "all"], "keeps them whole: use"),
        (["--backend.offload-dir", "/nvme"], "zero3 alone swaps to a disk: use backend.name zero3"),
        (["--backend.name", "zero3", "--backend.offload-dir", "/nvme"], "none moves nothing there"),
        (
            [*OFFLOADED, "--backend.offload-dir", "nvme"],
            "backend.offload_dir is nvme: give an absolute path, the same on each node",
        ),
        (["--backend.name", "ddp", "--backend.replicas", "2"], "ddp does not know: use"),
        (["--backend.name", "zero3", "--backend.reshard", "no"], "zero3 does not know: use"),
        (["--backend.name", "ddp", "--backend.prefetch", "1"], "ddp does not know: use"),
        (["--backend.reshard", "1"], "backend.reshard is '1': give yes, no, or how many"),
        (["--backend.reshard", "maybe"], "backend.reshard is 'maybe'"),
        (["--backend.replicas", "0"], "backend.replicas is 0: it must be above 0"),
        (["--memory.compile", "--memory.checkpointing", "selective"], "use memory.checkpointing f"),
        (["--memory.offload-activations", "--memory.checkpointing", "full"], "nothing to move"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(arguments, said):
    with pytest.raises(UserError) as error:
        override(recipe("demo"), arguments)
    assert said in str(error.value)
    assert "; " not in str(error.value), "once"


@pytest.mark.parametrize(
    ("arguments", "world_size", "said"),
    [
        (["--backend.replicas", "3"], 4, "replicas 3 does not divide the 4 processes"),
        (["--backend.replicas", "4"], 4, "leaves nothing to divide"),
        (["--backend.reshard", "3"], 4, "backend.reshard 3 must divide the 4 processes"),
        (["--backend.reshard", "4"], 4, "and be below their number"),
        (["--backend.replicas", "2", "--backend.reshard", "4"], 8, "must divide the 4 processes"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(arguments, world_size, said):
    with pytest.raises(UserError) as error:
        override(recipe("demo"), arguments).check_world(world_size)
    assert said in str(error.value)


def test_it_is_refused_before_anything_starts(tmp_path, capsys):
    run = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), "--backend.replicas", "3"]
    assert main([*run, "--nproc", "4"]) == 2
    assert "error: backend.replicas 3 does not divide the 4 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_fits_the_processes_is_not():
    divided = ["--backend.replicas", "2", "--backend.reshard", "2"]
    override(recipe("demo"), divided).check_world(8)
    for world_size in (1, 3, 7):
        for name in ("ddp", "fsdp", "zero3"):
            override(recipe("demo"), ["--backend.name", name]).check_world(world_size)


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "all")])
def test_deepspeeds_configuration_follows_from_the_run_s(stage, offload):
    arguments = ["--backend.name", f"zero{stage}", "--backend.offload", offload]
    arguments += ["--train.accumulate", "4", "--optim.clip-grad", "2.5"]
    config = override(recipe("demo"), arguments)
    shown = json.loads(config.describe())
    zero = shown.pop("deepspeed")
    assert RunConfig.from_json(json.dumps(shown)) == config
    assert (zero["gradient_accumulation_steps"], zero["gradient_clipping"]) == (4, 2.5)
    assert zero["zero_optimization"]["stage"] == stage
    moved = {name for name in zero["zero_optimization"] if name.startswith("offload")}
    assert len(moved) == ["none", "optimizer", "all"].index(offload)


def test_deepspeed_is_told_of_a_disk_and_of_half_precision():
    arguments = [*OFFLOADED, "--train.precision", "fp16", "--backend.offload-dir", "/nvme"]
    runs = [override(recipe("demo"), [*arguments, "--run-dir", name]) for name in ("/a", "/b")]
    first, second = (json.loads(run.describe())["deepspeed"] for run in runs)
    assert first["torch_autocast"]["enabled"]
    assert first["torch_autocast"]["dtype"] == "float16"
    assert first["aio"]["queue_depth"] > 1
    moved = [told["zero_optimization"]["offload_optimizer"] for told in (first, second)]
    assert [place["device"] for place in moved] == ["nvme", "nvme"]
    assert moved[0]["nvme_path"].startswith("/nvme/")
    assert moved[0]["nvme_path"] != moved[1]["nvme_path"], "runs may share a disk"


def test_without_deepspeed_nothing_is_added_to_what_is_shown():
    assert recipe("demo").describe() == recipe("demo").to_json()


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("none", ()),
        ("full", (1, 2, 3, 4)),
        ("selective", (1, 2, 3, 4)),
        ("2", (2,)),
        ("3,1", (1, 3)),
        ("1,1", (1,)),
    ],
)
def test_stages_to_recompute(text, stages):
    assert MemoryConfig(checkpointing=text).stages() == stages


@pytest.mark.parametrize("text", ["", "0", "5", "1,", "1-3", "all"])
def test_other_stages_are_refused(text):
    config = dataclasses.replace(recipe("demo"), memory=MemoryConfig(checkpointing=text))
    assert [problem.split(" is ")[0] for problem in config.validate()] == ["memory.checkpointing"]


def test_nearest():
    assert nearest("pretran", ["pretrain", "data"]) == "; did you mean pretrain?"
    assert nearest("xyz", ["pretrain", "data"]) == ""


POSITIVE = st.floats(min_value=1e-12, max_value=1e6, allow_nan=False)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "--optim.lr": POSITIVE,
        "--optim.weight-decay": POSITIVE,
        "--optim.clip-grad": st.none() | POSITIVE,
        "--model.drop-path": st.floats(0, 1),
        "--model.pretrain-size": st.none() | st.integers(1, 1024),
        "--train.seed": st.integers(0, 2**31),
        "--data.auto-augment": st.none() | st.from_regex(r"[a-z][a-z0-9.-]{1,8}", fullmatch=True),
        "--data.train": st.from_regex(r"[A-Za-z/][A-Za-z0-9/ ._é-]{0,12}", fullmatch=True),
        "--train.precision": st.sampled_from(["fp32", "bf16", "fp16"]),
    },
)


@settings(deadline=None)
@given(st.sampled_from(sorted(RECIPES)), SETTINGS)
def test_a_configuration_survives_overrides_and_json(name, changes):
    arguments = [text for option, value in changes.items() for text in (option, str(value))]
    config = override(recipe(name), arguments)
    values = {option[2:].replace("-", "_"): value for option, value in changes.items()}
    assert dict(flatten(config)) == dict(flatten(recipe(name))) | values
    assert RunConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["recipe"] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["optim"].update(lr="fast"), "optim.lr is 'fast'"),
        (lambda tree: tree["train"].update(epochs=True), "train.epochs is True"),
        (lambda tree: tree["data"].update(crop_scale=[1.0]), "data.crop_scale is [1.0]"),
        (lambda tree: tree["backend"].update(name="magic"), "backend.name is 'magic'"),
        (lambda tree: tree.update(model=None), "not a run configuration"),
    ],
)
def test_a_stored_configuration_is_read_exactly(change, message):
    tree = json.loads(recipe("demo").to_json())
    change(tree)
    with pytest.raises(UserError) as error:
        RunConfig.from_json(json.dumps(tree), where="a/config.json")
    assert str(error.value).startswith("a/config.json is not a run configuration: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["optim"].update(lrr=1.0), "unknown setting optim.lrr"),
        (lambda tree: tree["optim"].pop("lr"), "missing setting optim.lr"),
        (lambda tree: tree.pop("log"), "missing setting log"),
    ],
)
def test_another_versions_configuration_is_told_from_a_damaged_one(change, message):
    tree = json.loads(recipe("demo").to_json())
    change(tree)
    with pytest.raises(UserError) as error:
        RunConfig.from_json(json.dumps(tree), where="/a run/config.json")
    said = str(error.value)
    assert f"/a run/config.json was written by another version of Foveate ({message})" in said
    assert "PYTHONPATH='/a run/code' PYTHONSAFEPATH=1 python -m launcher" in said


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"demo"'])
def test_json_that_is_no_configuration_is_refused(text):
    with pytest.raises(UserError, match="is not a run configuration"):
        RunConfig.from_json(text)
