"""FFCV itself against our .beton files: it reads what we write, and we what it writes."""

import gc

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.base import DataError, Shard
from data.build import build
from data.decode import decode_whole
from data.ffcv import NativeLoader
from data.folder import FolderSource
from data.pack import pack
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph

pytest.importorskip("ffcv", reason="builds only where OpenCV's headers are")
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.fields.rgb_image import encode_jpeg
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
from ffcv.writer import DatasetWriter

# numba's finalizers trip over one another.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
COUNT = 24


@pytest.fixture(autouse=True)
def _finalized():
    """Let them do so here, where nobody minds."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs of one size in three classes: JPEG files, and some PNG."""
    folder = tmp_path_factory.mktemp("images")
    photo = photograph(160, 120)
    for id in range(COUNT):
        kind = "png" if id % 5 == 0 else "jpeg"
        path = folder / f"class_{id % 3}" / f"{id:03d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        picture = photo.rotate(7 * id)
        path.write_bytes(encode(picture, kind.upper(), **({"quality": 95} if id % 5 else {})))
    return FolderSource(folder)


@pytest.mark.parametrize("image_mode", ["jpg", "raw", "mixed"])
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_what_we_write(images, tmp_path, image_mode, os_cache):
    pack(images, tmp_path / "out", format="beton", image_mode=image_mode, progress=lambda _: None)
    ours = TarSource(tmp_path / "out")
    loader = Loader(
        str(tmp_path / "out" / "out.beton"),
        batch_size=5,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    batches = [(pixels.clone(), labels.clone()) for pixels, labels in loader]
    pixels = torch.cat([pixels for pixels, _ in batches]).numpy()
    labels = torch.cat([labels for _, labels in batches])[:, 0]
    assert labels.tolist() == ours.labels.tolist()
    assert len(pixels) == COUNT
    for id in range(COUNT):
        sample = ours.read(id)
        difference = np.abs(decode_whole(sample.image).astype(int) - pixels[id])
        if isinstance(sample.image, bytes):
            assert difference.mean() < 2  # FFCV decodes with libjpeg's fast transform
        else:
            assert difference.max() == 0


class _Pairs:
    def __init__(self, count):
        self.images = [np.asarray(photograph(90 + 7 * id, 80 + 3 * id)) for id in range(count)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, id):
        return self.images[id], id % 4


@pytest.mark.parametrize(
    "mode",
    [
        {"write_mode": "raw"},
        {"write_mode": "jpg", "jpeg_quality": 90},
        {"write_mode": "proportion", "compress_probability": 0.5},
    ],
    ids=lambda mode: mode["write_mode"],
)
@pytest.mark.parametrize("names", [("image", "label"), ("y", "x")], ids=lambda names: names[0])
def test_we_read_what_ffcv_writes(tmp_path, mode, names):
    pairs = _Pairs(12)
    fields = {names[0]: RGBImageField(**mode), names[1]: IntField()}
    DatasetWriter(str(tmp_path / "a.beton"), fields, num_workers=2).from_indexed_dataset(
        pairs, chunksize=3
    )
    build(tmp_path, progress=lambda _: None)
    source = TarSource(tmp_path)
    assert source.labels.tolist() == [id % 4 for id in range(12)]
    for id in range(12):
        image = source.read(id).image
        if isinstance(image, bytes):
            assert image == encode_jpeg(pairs.images[id], quality=90).tobytes()
        else:
            assert np.array_equal(image, pairs.images[id])
    kinds = {type(source.read(id).image) for id in range(12)}
    assert kinds <= {bytes, np.ndarray}
    assert (np.ndarray in kinds) == (mode["write_mode"] != "jpg")


def test_other_fields_are_named(tmp_path):
    class Triples(_Pairs):
        def __getitem__(self, id):
            return *super().__getitem__(id), 0.5

    fields = {"image": RGBImageField(), "label": IntField(), "weight": FloatField()}
    DatasetWriter(str(tmp_path / "a.beton"), fields, num_workers=1).from_indexed_dataset(Triples(3))
    message = r"fields image \(image\), label \(integer\), weight \(float\); just one image"
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def native(folder, **settings):
    return NativeLoader(folder, **{"size": 32, "global_batch": 8, "seed": 3, **settings})


def test_its_loader_gives_batches_of_each_epoch(images, tmp_path):
    pack(images, tmp_path / "out", format="beton", progress=lambda _: None)
    loader = native(tmp_path / "out")
    source = TarSource(tmp_path / "out")
    assert loader.steps_per_epoch == 3
    stream = loader.batches(loader.start(), Shard(rank=0, world_size=1))
    seen = [next(stream) for _ in range(6)]
    stream.close()
    for batch, _ in seen:
        assert batch.images.shape == (8, 32, 32, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == source.labels[batch.ids.numpy()].tolist()
    epochs = [torch.cat([batch.ids for batch, _ in part]) for part in (seen[:3], seen[3:])]
    assert [sorted(ids.tolist()) for ids in epochs] == [list(range(COUNT))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert [(cursor.epoch, cursor.samples) for _, cursor in seen] == [
        *[(0, 8), (0, 16), (1, 0)],
        *[(1, 8), (1, 16), (2, 0)],
    ]
    again = native(tmp_path / "out").batches(seen[2][1], Shard(rank=0, world_size=1))
    assert next(again)[0].ids.tolist() == seen[3][0].ids.tolist()
    again.close()
    with pytest.raises(DataError, match="starts at epochs alone"):
        loader.batches(seen[0][1], Shard(rank=0, world_size=1))


def test_what_it_cannot_do_is_refused(images, tmp_path):
    pack(images, tmp_path / "tars", samples_per_shard=10, progress=lambda _: None)
    with pytest.raises(DataError, match=r"3 shards, tars-000000\.tar first, but .*one \.beton"):
        native(tmp_path / "tars")
    pack(images, tmp_path / "out", format="beton", progress=lambda _: None)
    with pytest.raises(DataError, match=r"global_batch 25 must lie in \[1, 24\]"):
        native(tmp_path / "out", global_batch=25)
    loader = native(tmp_path / "out")
    with pytest.raises(DataError, match="does not divide by 3 ranks"):
        loader.batches(loader.start(), Shard(rank=0, world_size=3))
    with pytest.raises(DataError, match=r"needs torch\.distributed for 2 ranks"):
        loader.batches(loader.start(), Shard(rank=0, world_size=2))
    with pytest.raises(DataError, match=r"belongs to data set .* seed 3"):
        native(tmp_path / "out", seed=4).batches(loader.start(), Shard(rank=0, world_size=1))


def test_ranks_share_an_epoch(images, tmp_path, monkeypatch):
    pack(images, tmp_path / "out", format="beton", progress=lambda _: None)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "is_available", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        loader = native(tmp_path / "out")
        stream = loader.batches(loader.start(), Shard(rank=rank, world_size=2))
        seen += [next(stream)[0] for _ in range(3)]
        stream.close()
    assert all(len(batch.ids) == 4 for batch in seen)
    assert sorted(torch.cat([batch.ids for batch in seen]).tolist()) == list(range(COUNT))
    assert sorted(torch.cat([batch.positions for batch in seen]).tolist()) == list(range(COUNT))
