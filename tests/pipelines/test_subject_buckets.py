"""Aspect-ratio buckets: sizes that fit the model, and the nearest aspect ratio for each image."""

import math

import pytest

from pipelines.buckets import BucketOrder, automatic_buckets, nearest_bucket, parse_buckets, size_multiple
from pipelines.errors import InputError
from pipelines.randomness import RandomStream


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 32), (64, 16), (512, 64), (16, 8)])
def test_automatic_buckets_fit_the_model_and_the_squares_area(resolution, multiple):
    buckets = automatic_buckets(resolution, multiple)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)
        # One step wider would be too large.
        assert height * (width + multiple) > resolution**2


def test_sizes_are_parsed_as_height_and_width_like_in_diffusers():
    assert parse_buckets(" 64,96; 96,64;64,64;64,96;", 16) == ((64, 96), (96, 64), (64, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64", r"'auto', or heights and widths such as .*got '64'"),
        ("64,x", r"got '64,x'"),
        ("64,72", r"multiples of 16 for this model, got '64,72'"),
        ("0,64", r"multiples of 16 for this model, got '0,64'"),
        (" ; ", r"or hold a size such as '1024,1024', got ' ; '"),
    ],
)
def test_invalid_sizes_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_buckets(text, 16)


def test_an_image_gets_the_bucket_that_crops_least():
    buckets = automatic_buckets(64, 16)

    def left_after_crop(size, bucket):
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        return bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)

    for size in ((300, 400), (400, 300), (1000, 1000), (100, 900), (333, 250), (51, 64)):
        kept = left_after_crop(size, nearest_bucket(size, buckets))
        assert kept == pytest.approx(max(left_after_crop(size, bucket) for bucket in buckets))


def test_the_largest_of_equal_shapes_is_used():
    assert nearest_bucket((100, 100), ((32, 32), (64, 64), (48, 48))) == (64, 64)


def test_every_level_of_the_model_halves_sizes_evenly(pipe):
    multiple = size_multiple(pipe)
    halvings = len(pipe.unet.down_blocks) - 1 + int(math.log2(pipe.vae_scale_factor))
    assert multiple == 2**halvings


def test_two_streams_of_one_seed_are_different_orders():
    first, second = (
        BucketOrder((tuple(range(50)),), 50, 0, stream).chosen(0, 0) for stream in (RandomStream.ORDER, RandomStream.CLASS_ORDER)
    )
    assert sorted(first) == sorted(second)
    assert first != second
