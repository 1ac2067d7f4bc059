"""What a prompt is expected to take, before anything of it is decoded."""

from __future__ import annotations

from PIL import Image

from medvqa_rl.data.images.files import FileImage


def test_it_follows_text_and_the_size_in_the_header(tiny_policy, make_sample, tmp_path):
    processor = tiny_policy().processor  # 112 x 112 pixels at most, 28 x 28 a token
    sizes = {"small": (56, 56), "large": (112, 112), "huge": (900, 900)}
    for name, size in sizes.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    found = {
        name: processor.expected_tokens(make_sample(images=(FileImage(f"{name}.png", tmp_path),), question="x" * 40))
        for name in sizes
    }
    assert found == {"small": 10 + 4, "large": 10 + 16, "huge": 10 + 16}
    assert processor.expected_tokens(make_sample(images=(), question="x" * 40)) == 10
    unknown = processor.expected_tokens(make_sample(question="x" * 40))  # drawn in memory: no header
    assert unknown == 10 + 16
