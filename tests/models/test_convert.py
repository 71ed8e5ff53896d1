"""Official checkpoint files, both ways: containers, layouts, and errors that name what is wrong."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from models import build
from models.base import ModelError
from models.convert import load_weights, official_state, read_weights, save_official
from tests.models.golden_stream import document

PICO = ["transnext_pico", "transxnet_pico"]
PUBLISHED = [
    *("transnext_micro", "transnext_tiny", "transnext_small", "transnext_base"),
    "transnext_micro_AAAA",
    *("transxnet_t", "transxnet_s", "transxnet_b"),
]
OUTPUT_NORMS = [f"norm{place}.{kind}" for place in (0, 2, 4, 6) for kind in ("weight", "bias")]


def trained(name, num_classes=4, **options):
    """A model whose every value, running statistics included, differs from a fresh one's."""
    torch.manual_seed(1)
    model = build(name, img_size=32, num_classes=num_classes, **options)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand(value.shape) if value.is_floating_point() else 3)
    return model


def fresh(name, num_classes=4, **options):
    torch.manual_seed(7)
    return build(name, img_size=32, num_classes=num_classes, **options)


def equal(found, expected):
    return list(found) == list(expected) and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def detector(weights):
    """What mmdet and mmseg save: a backbone among other parts."""
    inside = {f"backbone.{name}": value for name, value in weights.items()}
    return {"meta": {"epoch": 12}, "state_dict": {**inside, "bbox_head.fc.weight": torch.ones(3)}}


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3, "args": Namespace(model="transnext_tiny", lr=1e-3)},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {"state_dict": {k: v * 0 for k, v in w.items()}, "state_dict_ema": w},
        lambda w: {"module": {"ema": w}, "optimizer": {"state": {}}},
        detector,
    ],
)
def test_unwraps(tmp_path, name, wrap):
    weights = trained(name).state_dict()
    torch.save(wrap(weights), tmp_path / "file.pth")
    model = fresh(name)
    assert load_weights(model, tmp_path / "file.pth") == []
    assert equal(model.state_dict(), weights)


def test_safetensors(tmp_path):
    weights = trained("transnext_pico").state_dict()
    save_file(weights, tmp_path / "file.safetensors")
    read = read_weights(tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("name", "container"), list(zip(PICO, ["model", "state_dict"], strict=True))
)
def test_classification_round_trip(tmp_path, name, container):
    model, path = trained(name), tmp_path / "file.pth"
    save_official(model, path)
    written = torch.load(path, weights_only=True)
    assert list(written) == [container]
    assert equal(written[container], model.state_dict())
    other = fresh(name)
    assert load_weights(other, path) == []
    assert equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(("name", "head"), list(zip(PICO, ["head.", "classifier."], strict=True)))
@pytest.mark.parametrize("num_classes", [0, 4])
def test_dense_round_trip(tmp_path, name, head, num_classes):
    model, path = trained(name, num_classes), tmp_path / "file.pth"
    save_official(model, path, layout="dense")
    written = torch.load(path, weights_only=True)["state_dict"]
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(head)}
    norms = OUTPUT_NORMS if name == "transxnet_pico" else []
    assert list(written) == [*trunk, *norms]
    assert all(written[norm].eq(float("weight" in norm)).all() for norm in norms)
    other = fresh(name, num_classes=0)
    before = {k: v.clone() for k, v in other.state_dict().items() if k.startswith(head)}
    assert load_weights(other, path) == norms
    assert equal(other.state_dict(), {**trunk, **before})
    assert other(torch.zeros(2, 3, 32, 32)).shape == (2, other.feature_info[-1]["num_chs"])


def test_dense_files_may_lack_early_norms(tmp_path):
    """Detectors that skip the first stage have no norm for it."""
    state = official_state(trained("transxnet_pico"), layout="dense")
    del state["norm0.weight"], state["norm0.bias"]
    torch.save(detector(state), tmp_path / "file.pth")
    left = load_weights(fresh("transxnet_pico", num_classes=0), tmp_path / "file.pth")
    assert left == OUTPUT_NORMS[2:]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    with torch.device("meta"):
        model = build(name, img_size=256, pretrain_size=224)
    golden = document(f"{name}.names.json")
    official = {**golden["params"], **golden["buffers"]}
    written = {k: list(v.shape) for k, v in official_state(model, layout="classification").items()}
    assert written == official
    for kind in ("params", "buffers"):  # the fixture lists them apart, a file interleaves them
        assert [k for k in written if k in golden[kind]] == list(golden[kind])
    dense = list(official_state(model, layout="dense"))
    norms = OUTPUT_NORMS if name.startswith("transxnet") else []
    trunk = [k for k in written if k.split(".")[0] not in ("head", "classifier")]
    assert dense == [*trunk, *norms]


def test_timm_files(tmp_path):
    model = trained("timm:test_resnet")
    save_official(model, tmp_path / "file.pth")
    written = torch.load(tmp_path / "file.pth", weights_only=True)["state_dict"]
    assert list(written) == list(model.net.state_dict())
    other = fresh("timm:test_resnet")
    assert load_weights(other, tmp_path / "file.pth") == []
    assert equal(other.state_dict(), model.state_dict())
    with pytest.raises(ModelError, match="timm:test_resnet has no dense layout"):
        save_official(model, tmp_path / "file.pth", layout="dense")


def test_errors_name_what_does_not_fit(tmp_path):
    weights = trained("transnext_pico").state_dict()
    weights["head.extra"] = weights.pop("norm4.weight")
    weights["head.bias"] = torch.zeros(9)
    torch.save({"model": weights}, tmp_path / "file.pth")
    model = fresh("transnext_pico")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "file.pth")
    for part in ("missing: norm4.weight", "unknown: head.extra", r"head.bias (9,) instead of (4,)"):
        assert part in str(caught.value)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("written", "read", "advice"),
    [
        (("transnext_pico", {}), ("transxnet_pico", {}), "'transnext_pico', num_classes=4)"),
        (
            ("transxnet_pico", {"pretrain_size": 64}),
            ("transxnet_pico", {}),
            "'transxnet_pico', num_classes=4, pretrain_size=64)",
        ),
        (("transnext_pico", {}), ("transnext_pico", {"num_classes": 0}), "num_classes=4)"),
        (("timm:test_vit", {}), ("transnext_pico", {}), "Build the model that wrote it"),
    ],
)
def test_another_models_file_is_named(tmp_path, written, read, advice):
    size = {"num_classes": 4}
    with torch.device("meta"):
        model = build(written[0], img_size=160, **(size | written[1]))
    state = {
        k: torch.zeros(v.shape) for k, v in official_state(model, layout="classification").items()
    }
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(fresh(read[0], **read[1]), tmp_path / "file.pth")
    assert advice in str(caught.value)


def test_a_dense_file_leaves_no_head_empty(tmp_path):
    save_official(trained("transnext_pico"), tmp_path / "file.pth", layout="dense")
    with pytest.raises(ModelError, match=r"missing: head.weight, head.bias.*num_classes=0"):
        load_weights(fresh("transnext_pico"), tmp_path / "file.pth")


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ModelError, match="has no head; write it with layout dense"):
        save_official(fresh("transnext_pico", num_classes=0), tmp_path / "file.pth")
    with pytest.raises(ModelError, match="layout is 'coco'; it must be classification or dense"):
        save_official(fresh("transnext_pico"), tmp_path / "file.pth", layout="coco")
    with pytest.raises(ModelError, match=r"cannot write weights to .*absent"):
        save_official(fresh("transnext_pico"), tmp_path / "absent" / "file.pth")
    assert list(tmp_path.iterdir()) == []


class Arbitrary:
    pass


@pytest.mark.parametrize(
    "content", [{"lr": 0.1}, [1, 2], {"model": Arbitrary()}, {"args": Namespace(x=Arbitrary())}]
)
def test_unreadable_files(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ModelError, match=r"file\.pth"):
        read_weights(tmp_path / "file.pth")
    with pytest.raises(ModelError, match=r"absent\.pth"):
        read_weights(tmp_path / "absent.pth")
