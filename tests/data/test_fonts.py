import copy
import shutil

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from onmanifold.data import fonts
from onmanifold.foundation.errors import DataError

GOOD = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "cmr10.ttf", "cmss10.ttf", "STIXGeneralItalic.ttf")


@pytest.fixture
def folder(tmp_path):
    """A few good fonts."""
    place = tmp_path / "fonts"
    place.mkdir()
    for name in GOOD:
        shutil.copy(fonts.embedded_folder() / name, place)
    return place


def blank(font):
    name = font.getBestCmap()[ord("D")]
    empty = copy.deepcopy(font["glyf"]["space"])
    font["glyf"][name] = empty


def remap(changes):
    def change(font):
        names = {letter: font.getBestCmap()[ord(to)] for letter, to in changes.items() if to}
        for table in font["cmap"].tables:
            for letter in changes:
                table.cmap.pop(ord(letter), None)
            table.cmap |= {ord(letter): name for letter, name in names.items()}

    return change


BAD = {
    "missing glyph": (remap({"C": None}), "no C"),
    "blank glyph": (blank, "D"),
    "same glyph twice": (remap({"B": "H"}), "B and H"),
    "letters not recognised": (
        remap(dict(zip("ABCDEFGHIJ", "*+-!#?=&%$", strict=True))),
        "of 10 recognised",
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_font_that_cannot_serve_is_left_out_with_the_reason(folder, reason):
    change, detail = BAD[reason]
    font = TTFont(fonts.embedded_folder() / "cmtt10.ttf")
    change(font)
    font.save(folder / "Bad.ttf")
    found = fonts.load_fonts(folder)
    assert set(found.names) == set(GOOD)
    (rejected,) = found.rejected
    assert (rejected.file, rejected.reason) == ("Bad.ttf", reason)
    assert detail in rejected.detail
    assert f"1 {reason}" in found.summary()


def test_a_shifted_alphabet_is_not_the_letters(folder):
    font = TTFont(fonts.embedded_folder() / "cmtt10.ttf")
    remap(dict(zip("ABCDEFGHIJ", "CDEFGHIJKL", strict=True)))(font)
    font.save(folder / "Shifted.ttf")
    assert [rejected.reason for rejected in fonts.load_fonts(folder).rejected] == [
        "letters not recognised"
    ]


def test_the_jury_needs_no_company(tmp_path):
    shutil.copy(fonts.embedded_folder() / "cmtt10.ttf", tmp_path)
    assert fonts.load_fonts(tmp_path).names == ("cmtt10.ttf",)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_left_out(folder, share):
    content = (fonts.embedded_folder() / "cmtt10.ttf").read_bytes()
    (folder / "Truncated.ttf").write_bytes(content[: int(share * len(content))])
    (rejected,) = fonts.load_fonts(folder).rejected
    assert (rejected.file, rejected.reason) == ("Truncated.ttf", "unreadable")


def test_nothing_but_a_truncated_file_is_an_error_that_names_it(tmp_path):
    content = (fonts.embedded_folder() / "cmtt10.ttf").read_bytes()
    (tmp_path / "Truncated.ttf").write_bytes(content[:1000])
    with pytest.raises(DataError, match=r"No usable font among the 1.*Truncated\.ttf: unreadable"):
        fonts.load_fonts(tmp_path)


def test_a_file_that_is_no_font_is_left_out(folder):
    (folder / "Text.otf").write_text("A B C D E F G H I J" * 100)
    (rejected,) = fonts.load_fonts(folder).rejected
    assert rejected.reason == "unreadable"


def test_a_near_duplicate_names_the_font_it_repeats(folder):
    font = TTFont(folder / "cmr10.ttf")
    letter = font.getBestCmap()[ord("A")]
    coordinates = font["glyf"][letter].coordinates
    coordinates[0] = (coordinates[0][0] + 10, coordinates[0][1])
    font.save(folder / "zcopy.ttf")
    (rejected,) = fonts.load_fonts(folder).rejected
    assert (rejected.file, rejected.reason) == ("zcopy.ttf", "near-duplicate")
    assert "cmr10.ttf" in rejected.detail


def test_the_embedded_fonts_serve():
    found = fonts.load_fonts(fonts.embedded_folder())
    assert len(found) >= 20
    assert found.prototypes.shape == (len(found), 10, 28, 28)
    assert found.prototypes.dtype == np.uint8
    # Font size 21: capitals are about two thirds of it, centred by their box.
    rows = found.prototypes[:, 7].max(axis=2) > 64
    heights = rows.sum(axis=1)
    assert ((heights >= 12) & (heights <= 18)).all()
    tops, bottoms = rows.argmax(axis=1), rows[:, ::-1].argmax(axis=1)
    assert (abs(tops - bottoms) <= 1).all()
    names = {rejected.file: rejected.reason for rejected in found.rejected}
    assert names["STIXNonUni.ttf"] == "missing glyph"
    assert "cmex10.ttf" in names
    files = {path.name for path in fonts.embedded_folder().glob("*.ttf")}
    assert files == set(names) | set(found.names)


def test_the_second_time_comes_from_the_cache(folder, monkeypatch):
    first = fonts.load_fonts(folder)
    fonts._load.cache_clear()
    monkeypatch.setattr(fonts, "render_fonts", lambda files: pytest.fail("rendered again"))
    second = fonts.load_fonts(folder)
    assert np.array_equal(first.prototypes, second.prototypes)
    assert (first.names, first.rejected, first.fingerprint) == (
        second.names,
        second.rejected,
        second.fingerprint,
    )


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_a_damaged_cache_is_built_again(folder, own_cache, damage):
    first = fonts.load_fonts(folder)
    (file,) = own_cache.glob("fonts-*.npz")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "garbage":
        content = bytearray(b"no archive")
    else:
        content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    fonts._load.cache_clear()
    assert fonts.load_fonts(folder).fingerprint == first.fingerprint


def test_another_file_is_seen(folder):
    before = fonts.load_fonts(folder)
    shutil.copy(fonts.embedded_folder() / "cmtt10.ttf", folder)
    after = fonts.load_fonts(folder)
    assert set(after.names) - set(before.names) == {"cmtt10.ttf"}
    assert after.fingerprint != before.fingerprint


def test_a_cache_that_cannot_be_written_does_not_stop_the_work(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ONMANIFOLD_CACHE", str(tmp_path / "file"))
    assert set(fonts.load_fonts(folder).names) == set(GOOD)


def test_where_fonts_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("ONMANIFOLD_DATA", raising=False)
    assert fonts.fonts_folder() == fonts.embedded_folder()
    monkeypatch.setenv("ONMANIFOLD_DATA", str(tmp_path))
    assert fonts.fonts_folder() == fonts.embedded_folder()
    (tmp_path / "fonts").mkdir()
    assert fonts.fonts_folder() == tmp_path / "fonts"
    with pytest.raises(DataError, match="No usable font among the 0"):
        fonts.load_fonts()
    with pytest.raises(DataError, match=r"absent.*does not exist"):
        fonts.load_fonts(tmp_path / "absent")


def test_real_fonts_symbols_go_and_letters_stay(real_data):
    folder = real_data("fonts")
    found = fonts.load_fonts(folder)
    reasons = {rejected.file: rejected.reason for rejected in found.rejected}
    foreign = (
        *("FutharkAdapted-Regular.ttf", "MonlamUniDutsa2-Regular.ttf", "Symbol-Regular.ttf"),
        *("Ellhnikh-Regular.ttf", "Ellhnikh-BoldItalic.ttf", "Alfabeta-Regular.ttf"),
        *("jsMathmsam10-msam10.ttf", "jsMathstmary10-stmary10.ttf", "jsMathwasy10-wasy10.ttf"),
    )
    assert {reasons.get(file) for file in foreign} == {"letters not recognised"}
    unusual = (
        *("DancingScript-Regular.otf", "LobsterTwo-Bold.otf", "KaushanScript-Regular.otf"),
        *("EBGaramond12AllSC-AllSC.ttf", "DSEG7Classic-Bold.ttf", "CabinSketch-Bold.ttf"),
        *("DkgHandwriting-Roman.ttf", "Lato-Hairline.ttf", "UbuntuTitle-Book.ttf"),
    )
    files = {path.name for path in folder.iterdir()}
    assert set(unusual) & files <= set(found.names)
    assert set(reasons) | set(found.names) == files
    assert len(found) > 0.8 * len(files)
