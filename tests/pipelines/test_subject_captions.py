"""The prompt of each image, and several subjects in folders."""

import json

import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.subject.captions import class_prompts, find_captioned


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def prompts(folder, prompt="a photo of sks dog"):
    return {found.path.name: found.prompt for found in find_captioned(folder, prompt)}


def test_metadata_takes_precedence_over_a_text_file_and_that_over_the_prompt(tmp_path):
    for name in "abc":
        image(tmp_path / f"{name}.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"file of {name}\n")
    metadata(tmp_path, {"file_name": "a.png", "text": "line of a"}, "")
    assert prompts(tmp_path) == {"a.png": "line of a", "b.png": "file of b", "c.png": "a photo of sks dog"}


def test_each_folder_is_a_subject_and_its_name_is_put_into_the_prompt(tmp_path):
    for place in ("red_dog/0.png", "red_dog/1.png", "cat/0.png", ".hidden/0.png"):
        image(tmp_path / place)
    (tmp_path / "notes").mkdir()
    found = find_captioned(tmp_path, "a photo of {subject}")
    assert [(item.subject, item.path.name, item.prompt) for item in found] == [
        ("cat", "0.png", "a photo of cat"),
        ("red dog", "0.png", "a photo of red dog"),
        ("red dog", "1.png", "a photo of red dog"),
    ]
    assert {item.kind for item in found} == {"instance"}


def test_images_with_the_same_name_in_two_folders_have_separate_captions(tmp_path):
    for subject in ("cat", "dog", "owl"):
        image(tmp_path / subject / "0.png")
    (tmp_path / "cat" / "0.txt").write_text("a cat by its text")
    metadata(tmp_path, {"file_name": "dog/0.png", "text": "a dog by the outer list"})
    metadata(tmp_path / "owl", {"file_name": "0.png", "text": "an owl by its own list"})
    found = {item.subject: item.prompt for item in find_captioned(tmp_path, None)}
    assert found == {"cat": "a cat by its text", "dog": "a dog by the outer list", "owl": "an owl by its own list"}


def test_folders_beside_images_are_not_subjects(tmp_path):
    image(tmp_path / "0.png")
    image(tmp_path / "class" / "0.png")
    assert [item.path for item in find_captioned(tmp_path, "dog")] == [tmp_path / "0.png"]


def test_hidden_files_are_not_images(tmp_path):
    image(tmp_path / "0.png")
    (tmp_path / "._0.png").write_bytes(b"what another system leaves")
    assert list(prompts(tmp_path)) == ["0.png"]


def test_a_caption_in_any_script_and_with_a_byte_order_mark_is_read(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("一只狗 ünd".encode("utf-8-sig"))
    assert prompts(tmp_path) == {"a.png": "一只狗 ünd"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name'}", r"Line 2 of .*metadata\.jsonl' is not JSON"),
        ([1], r"Line 2 .*must be an object"),
        ({"text": "a"}, r"must have a 'file_name' that is not empty, got None"),
        ({"file_name": "a.png", "text": " "}, r"must have a 'text' that is not empty, got ' '"),
        ({"file_name": "z.png", "text": "a"}, r"names 'z\.png', which does not exist"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(tmp_path, line, message):
    image(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "a"}, line)
    with pytest.raises(InputError, match=message):
        prompts(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(b" \n", r"a\.txt' is empty"), (b"\xff\xfe\xff", r"a\.txt' is UTF-16 text")])
def test_an_empty_text_file_is_refused(tmp_path, content, message):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prompts(tmp_path)


def test_an_image_without_a_prompt_is_refused(tmp_path):
    image(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png' has no caption.*--instance_prompt.*a\.txt"):
        prompts(tmp_path, None)


def test_a_missing_folder_is_named_with_the_flag_to_set(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*missing.*--instance_data_dir"):
        find_captioned(tmp_path / "missing", "dog")


def test_a_folder_without_images_is_named_with_what_it_should_hold(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no image .*\.jpg.*three to ten"):
        find_captioned(tmp_path, "dog")


def test_a_subjects_class_prompt_is_that_of_its_folder_or_else_the_common_one(tmp_path):
    for subject in ("cat", "dog"):
        image(tmp_path / subject / "0.png")
    (tmp_path / "cat" / "class_prompt.txt").write_text("a photo of a cat\n")
    assert class_prompts(tmp_path, "a photo of a pet") == {"cat": "a photo of a cat", "dog": "a photo of a pet"}
    with pytest.raises(InputError, match=r"needs the class of the subject in .*dog.*--class_prompt.*class_prompt\.txt"):
        class_prompts(tmp_path, None)
