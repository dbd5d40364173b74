"""The scan of an image folder: the images of each subject, and an account of everything else."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from shared_cases import case_folder

from pipelines.errors import InputError
from pipelines.subject.caption_files import read_captions
from pipelines.subject.captions import class_prompts, find_captioned, subject_folders
from pipelines.subject.folder_entries import REASONS, FolderAccount
from pipelines.subject.folder_listing import list_folder
from pipelines.subject.folder_names import class_words, kohya_name, unused_kind
from pipelines.subject.folder_scan import scan_folder
from pipelines.subject.image_checks import check_images
from pipelines.subject.prior import ClassImages


def write(folder, *names):
    """Write files to `folder`, grey images for names of images and text for others; returns `folder`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg"):
            Image.new("L", (8, 8)).save(path, "PNG")
        else:
            path.write_text("words")
    return folder


def colour(folder, *names):
    """Write coloured images, which are not masks."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def account(folder, **more):
    return read_captions(scan_folder(folder, **more)).account


def used(folder, **more):
    """Images by subject."""
    return {subject.name: [path.name for path in subject.images] for subject in scan_folder(folder, **more).subjects}


def kinds(folder, **more):
    """The reason of each file and folder that is not used."""
    entries = account(folder, **more).entries
    return {entry.path.relative_to(folder).as_posix(): entry.kind for entry in entries if entry.kind}


# --- images beside folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "images", "folders"),
    [
        (["cover.jpg", "blue mug/1.jpg", "red hat/3.jpg"], ["cover.jpg"], ["blue mug", "red hat"]),
        (["00.jpg", "01.jpg", "more/x3.jpg"], ["00.jpg", "01.jpg"], ["more"]),
        (["a.png", "10_sks toy/b.png"], ["a.png"], ["10_sks toy"]),
    ],
)
def test_images_beside_folders_of_images_are_refused_with_both_lists(tmp_path, files, images, folders):
    write(tmp_path, *files)
    for scan in (subject_folders, check_images, lambda folder: find_captioned(folder, "sks toy")):
        with pytest.raises(InputError, match=r"holds images .* beside folders of images .*Move or remove") as refused:
            scan(tmp_path)
        assert all(repr(name) in str(refused.value) for name in [*images, *folders])


@pytest.mark.parametrize("name", ["stray_cover", "nested_top_and_sub"])
def test_mixed_folders_from_bug_reports_are_refused(name):
    with pytest.raises(InputError, match="beside folders of images"):
        check_images(case_folder("photos-stray-on-top") / name)


@pytest.mark.parametrize("inside", ["empty/", "notes/readme.md", ".hidden/0.png", "run/status.json run/options.json run/a.png"])
def test_a_folder_without_a_subject_beside_images_is_reported_and_not_refused(tmp_path, inside):
    write(tmp_path, "0.png", *(name for name in inside.split() if not name.endswith("/")))
    folder = tmp_path / inside.split("/")[0]
    folder.mkdir(exist_ok=True)
    assert used(tmp_path) == {tmp_path.name.replace("_", " "): ["0.png"]}
    assert kinds(tmp_path)[folder.name] in ("no_images", "system", "run")


# --- the account ------------------------------------------------------------------------------------------------------------


def test_every_file_and_folder_is_used_or_reported_with_the_reason(tmp_path):
    reasons = {
        "00.jpg.caption": "same_caption",
        "99.txt": "caption_without_image",
        "00.json": "foreign_caption",
        "captions.tsv": "foreign_caption",
        "00.npz": "latents_cache",
        "old.safetensors": "model_file",
        "photos.zip": "archive",
        "clip.mp4": "video",
        "raw.cr2": "other_format",
        "notes.md": "unknown",
        "LICENSE": "unknown",
        "Thumbs.db": "system",
        ".DS_Store": "system",
        "gone.jpg": "broken_link",
        "loop": "broken_link",
        "self": "link_to_itself",
        "pipe": "not_a_file",
        "deep": "image_too_deep",
        "empty": "no_images",
    }
    write(tmp_path, "00.jpg", "00.txt", "deep/inner/1.jpg", *(name for name, kind in reasons.items() if "." in name))
    (tmp_path / "empty").mkdir()
    (tmp_path / "LICENSE").write_text("words")
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "self").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert kinds(tmp_path) == reasons
    entries = {entry.path.name: entry for entry in account(tmp_path).entries}
    assert set(entries) == {path.name for path in tmp_path.iterdir()}
    assert entries["00.txt"].image == tmp_path / "00.jpg"
    words = "\n".join(account(tmp_path).warnings())
    quiet = ("Thumbs.db", ".DS_Store", "raw.cr2", "00.jpg.caption")
    assert all((f"'{name}'" in words) == (name not in quiet) for name in reasons)
    assert FolderAccount.from_json(json.loads(json.dumps(account(tmp_path).to_json()))) == account(tmp_path)


def test_files_with_the_same_reason_share_one_line(tmp_path):
    write(tmp_path, "a.png", *(f"{number}.npz" for number in range(9)))
    (line,) = account(tmp_path).warnings()
    assert line == f"Not used: '0.npz', '1.npz', '2.npz' and 6 more. {REASONS['latents_cache']}"


def test_the_report_lists_unused_files(tmp_path):
    write(tmp_path, "a.png", "b.mp4")
    (tmp_path / "c.heic").write_bytes(b"any")
    report = check_images(tmp_path)
    assert "Not used: 'b.mp4'. Videos are not read." in report.summary()
    assert report.has_warnings
    files = {Path(entry["path"]).name: entry for entry in report.to_dict()["folder"]["files"]}
    assert files["a.png"]["use"] == "image"
    assert files["b.mp4"]["reason"] == REASONS["video"]


@pytest.mark.parametrize(
    ("name", "message"), [("a.png", "--instance_data_dir must be a folder with images, but .* is a file"), ("no", "no folder")]
)
def test_a_path_that_is_not_a_folder_is_refused(tmp_path, name, message):
    write(tmp_path, "a.png")
    with pytest.raises(InputError, match=message):
        scan_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["x/y/0.png"], r"holds no image .*not from deeper folders.*The first is .*x/y/0\.png"),
        (["0.cr2"], r"holds no image .*formats are not read: '0\.cr2'"),
        (["notes.md"], r"holds no image .*Not used: 'notes\.md'"),
    ],
)
def test_a_folder_without_images_says_what_it_holds_instead(tmp_path, files, message):
    write(tmp_path, *files)
    with pytest.raises(InputError, match=message):
        scan_folder(tmp_path)


def test_folders_without_read_permission_are_reported(tmp_path, monkeypatch):
    write(tmp_path, "0.png", "secret/1.png")
    real = Path.iterdir

    def guarded(path):
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    assert kinds(tmp_path) == {"secret": "unreadable"}

    def closed(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        scan_folder(tmp_path)


# --- masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    ["00-masklabel.png", "00.mask.png", "00_mask.png", "00-mask.PNG", "00_MASK.png", "00.jpg.mask.png", "mask_00.png"],
)
def test_a_mask_of_an_image_is_never_an_image(tmp_path, mask):
    write(tmp_path, "00.jpg", "01.jpg", mask)
    assert list(used(tmp_path).values()) == [["00.jpg", "01.jpg"]]
    (entry,) = (entry for entry in account(tmp_path).entries if entry.use == "mask")
    assert (entry.path.name, entry.image) == (mask, tmp_path / "00.jpg")
    assert f"'{mask}'. They are masks" in " ".join(account(tmp_path).warnings())


@pytest.mark.parametrize("name", ["foo_mask.png", "carnival.mask.png", "mask.png", "maskara.png", "02-masklabel.png"])
def test_an_image_named_like_a_mask_that_matches_no_image_is_an_image(tmp_path, name):
    write(tmp_path, "00.jpg", name)
    assert list(used(tmp_path).values()) == [sorted(["00.jpg", name])]


def test_masks_from_bug_reports_are_left_out():
    folder = case_folder("photos-masks") / "masks_beside"
    assert list(used(folder).values()) == [["00.png", "01.png", "02.png"]]
    assert [image.path.name for image in find_captioned(folder, "sks toy")] == ["00.png", "01.png", "02.png"]
    assert {path.name for path in check_images(folder).usable} == {"00.png", "01.png", "02.png"}


@pytest.mark.parametrize("images", ["", "images/", "dog/"])
@pytest.mark.parametrize("masks", ["mask", "Masks"])
@pytest.mark.parametrize("mask", ["00.png", "00_mask.png"])
def test_a_folder_of_masks_is_no_subject(tmp_path, images, masks, mask):
    colour(tmp_path, f"{images}00.png", f"{images}01.png")
    write(tmp_path, f"{masks}/{mask}")
    assert [len(names) for names in used(tmp_path).values()] == [2]
    assert kinds(tmp_path) == {masks: "mask_folder"}


def test_a_mask_can_be_the_subject(tmp_path):
    colour(tmp_path, "mask/00.png", "hat/00.png")
    assert used(tmp_path) == {"hat": ["00.png"], "mask": ["00.png"]}


def test_masks_in_a_subjects_folder_are_reported(tmp_path):
    colour(tmp_path, "hat/00.png", "mug/00.png")
    write(tmp_path, "hat/masks/00.png", "mug/more/01.png")
    assert used(tmp_path) == {"hat": ["00.png"], "mug": ["00.png"]}
    assert kinds(tmp_path) == {"hat/masks": "mask_folder", "mug/more": "image_too_deep"}


# --- kohya -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"), [("10_sks toy", "sks toy"), ("1_toy", "toy"), ("5_sks_toy", "sks toy"), ("toy_10", None), ("10_", None)]
)
def test_kohyas_folder_names_are_read(name, words):
    assert (kohya_name(name) and kohya_name(name).words) == words


@pytest.mark.parametrize(
    ("name", "others", "words"),
    [
        ("1_toy", ["10_sks toy"], "toy"),
        ("1_Toy", ["10_sks_toy"], "Toy"),
        ("5_red toy", ["10_sks red toy"], "red toy"),
        ("1_toy", ["sks toy"], "toy"),
        ("1_person", ["20_ohwx man"], "person"),
        ("1_toy", ["10_sks toy", "10_zxq dog"], "toy"),
        ("10_sks toy", ["1_toy"], None),
        ("1_sks toy", ["1_zxq dog"], None),
        ("1_dog", ["2_cat"], None),
        ("toy", ["sks toy"], None),
        ("1_toy", [], None),
    ],
)
def test_a_class_folder_is_distinguished_from_a_second_subject(name, others, words):
    assert class_words(name, others) == words


@pytest.mark.parametrize("with_photos", [True, False])
def test_kohya_folders_give_subjects_and_suggest_class_images(tmp_path, with_photos):
    folder = case_folder("photos-kohya-folders") / "kohya_img" if with_photos else tmp_path
    if not with_photos:
        write(tmp_path, "10_sks toy/0.png", "1_toy/3.png", "20_zxq dog/0.png")
    prompts = {image.prompt for image in find_captioned(folder, "a photo of {subject}")}
    assert prompts == {"a photo of sks toy"} | (set() if with_photos else {"a photo of zxq dog"})
    assert kinds(folder) == {"1_toy": "class_data"}
    words = " ".join(account(folder).warnings())
    assert f'--class_data_dir "{folder / "1_toy"}" --class_prompt "a photo of a toy"' in words
    assert "'10_sks toy' holds 'sks toy', repeats 10" in words
    assert "Repeats are ignored" in words
    assert "sks toy" in class_prompts(folder, "a photo of a toy")


def test_a_single_kohya_folder_is_read_by_its_name(tmp_path):
    write(tmp_path, "10_sks toy/0.png")
    assert used(tmp_path / "10_sks toy") == {"sks toy": ["0.png"]}
    assert "repeats 10" in account(tmp_path / "10_sks toy").warnings()[0]


def test_a_kohya_project_is_read_from_its_folder_img(tmp_path):
    write(tmp_path, "img/10_sks toy/0.png", "reg/1_toy/1.png", "log/a.txt", "model/sample/x.png", "model/last.safetensors")
    assert used(tmp_path) == {"sks toy": ["0.png"]}
    assert kinds(tmp_path) == {"reg": "class_data", "log": "no_images", "model": "kohya_sibling"}
    assert f'--class_data_dir "{tmp_path / "reg" / "1_toy"}" --class_prompt "a photo of a toy"' in " ".join(
        account(tmp_path).warnings()
    )


@pytest.mark.parametrize("name", ["reg", "regularization_images", "class", "Class_Images"])
def test_a_folder_of_class_images_beside_the_subject_is_suggested(tmp_path, name):
    write(tmp_path, "0.png", f"{name}/0.png")
    assert kinds(tmp_path) == {name: "class_data"}
    assert f'--class_data_dir "{tmp_path / name}"' in " ".join(account(tmp_path).warnings())


def test_the_folder_given_for_class_images_is_not_a_subject(tmp_path):
    write(tmp_path, "0.png", "dogs/0.png")
    assert list(used(tmp_path, class_data_dir=tmp_path / "dogs").values()) == [["0.png"]]
    (entry,) = (entry for entry in account(tmp_path, class_data_dir=tmp_path / "dogs").entries if entry.path.is_dir())
    assert (entry.use, entry.kind) == ("class_images", "")
    with pytest.raises(InputError, match="--class_data_dir and --instance_data_dir are both"):
        scan_folder(tmp_path, tmp_path)


# --- the folder of class images ----------------------------------------------------------------------------------------------


def class_account(folder, count=2, prompts=None):
    return ClassImages(folder, prompts or {"sks dog": "a photo of a dog"}, count, "model").account()


def test_a_folder_of_class_images_is_accounted_for_too(tmp_path):
    write(tmp_path, "0.png", "1.png", "2.png", "0.txt", "0_mask.png", "a.psd", "sub/9.png")
    shown = {entry.path.name: entry.kind for entry in class_account(tmp_path).entries}
    assert shown == {
        "0.png": "",
        "1.png": "",
        "2.png": "spare",
        "0_mask.png": "mask",
        "sub": "class_folder",
        "0.txt": "class_caption",
        "a.psd": "unknown",
    }


def test_class_images_in_deeper_folders_are_refused_with_the_folder_to_give(tmp_path):
    write(tmp_path, "1_toy/0.png")
    with pytest.raises(InputError, match=r"Give --class_data_dir the folder that contains them, such as '.*1_toy'"):
        class_account(tmp_path)
    with pytest.raises(InputError, match=r"--class_data_dir must be a folder with images, but .* is a file"):
        class_account(tmp_path / "1_toy" / "0.png")


def test_each_of_several_classes_has_a_folder_and_others_are_reported(tmp_path):
    write(tmp_path, "0.png", "a-photo-of-a-dog/0.png", "a-photo-of-a-cat/0.png", "fish/0.png")
    entries = class_account(tmp_path, prompts={"rex": "a photo of a dog", "tom": "a photo of a cat"}).entries
    strange = {entry.path.name: entry.kind for entry in entries if entry.kind}
    assert strange == {"0.png": "class_elsewhere", "fish": "class_folder"}
    assert not class_account(tmp_path / "none").entries


def test_masks_are_not_counted_as_class_images(tmp_path):
    write(tmp_path, "0.png", "0_mask.png")
    classes = ClassImages(tmp_path, {"sks dog": "a photo of a dog"}, 2, "model")
    assert len(classes.missing()) == 1
    assert [image.path.name for image in classes.images()] == ["0.png"]


@pytest.mark.parametrize(("name", "kind"), [("a.JSON", "foreign_caption"), ("a", "unknown"), ("a.b.ZIP", "archive")])
def test_suffixes_are_case_insensitive(name, kind):
    assert unused_kind(name, ["b.png"]) == kind


def test_excluded_images_are_accounted_for_with_their_captions_and_masks(tmp_path):
    write(tmp_path, "0.png", "1.png", "0.txt", "1.txt", "0-masklabel.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a toy"}))
    given = {"excluded_images": ["0.png"]}
    assert [image.path.name for image in find_captioned(tmp_path, None, **given)] == ["1.png"]
    assert [diagnosis.path.name for diagnosis in check_images(tmp_path, **given).images] == ["1.png"]
    excluded = {name for name, kind in kinds(tmp_path, **given).items() if kind == "excluded"}
    assert excluded == {"0.png", "0.txt", "0-masklabel.png"}
    found = account(tmp_path, **given)
    assert found.warnings() == []
    assert "Excluded by --excluded_images: '0.png'." in found.infos()


def test_images_of_subjects_are_excluded_by_folder_and_name(tmp_path):
    write(tmp_path, "cat/0.png", "dog/0.png", "dog/1.png")
    assert used(tmp_path, excluded_images=["dog/0.png"]) == {"cat": ["0.png"], "dog": ["1.png"]}
    assert used(tmp_path, excluded_images=["cat/0.png"]) == {"dog": ["0.png", "1.png"]}
    assert kinds(tmp_path, excluded_images=["cat/0.png"]) == {"cat": "excluded", "cat/0.png": "excluded"}


@pytest.mark.parametrize(
    ("names", "message"),
    [(["2.png"], r"must be images of .*, which are 0\.png, 1\.png, got 2\.png"), (["0.png", "1.png"], r"must leave an image of")],
)
def test_exclusions_of_no_image_or_of_all_images_are_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=f"excluded_images {message}"):
        scan_folder(write(tmp_path, "0.png", "1.png"), excluded_images=names)


def test_linked_images_and_folders_are_used(tmp_path):
    write(tmp_path / "store", "x.png")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "subjects").mkdir()
    (tmp_path / "subjects" / "hat").symlink_to(tmp_path / "store")
    assert used(tmp_path / "album") == {"album": ["a.png"]}
    assert used(tmp_path / "subjects") == {"hat": ["x.png"]}
    assert not list_folder(tmp_path / "album").unusable


def test_names_that_are_not_utf8_cause_no_traceback(tmp_path):
    folder = tmp_path / os.fsdecode(b"10_h\xfct")
    write(folder, os.fsdecode(b"\xe9.jpg"), os.fsdecode(b"\xe9_mask.png"), os.fsdecode(b"\xe8.mp4"), "0.png")
    image = find_captioned(folder, "a photo of {subject}")[-1]
    assert image.prompt == r"a photo of h\udcfct"
    report = check_images(folder)
    for text in ("".join(report.folder.warnings()), json.dumps(report.to_dict()["folder"], ensure_ascii=False)):
        assert r"\udce9_mask.png" in text.encode().decode()
