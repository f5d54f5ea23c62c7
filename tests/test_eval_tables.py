"""Tables with images in them: quotes, line breaks, places of images, workbooks."""

from __future__ import annotations

import base64
import io
import zipfile
from pathlib import Path

import pytest
from fixtures_eval import make_mmbench
from fixtures_tiny import picture, tiny_parts

from llava_uhd.errors import UserError
from llava_uhd.eval.generate import Answerer, Limits
from llava_uhd.eval.provenance import data_digest
from llava_uhd.eval.tables import images_of, read_table, whole_number
from llava_uhd.eval.tasks import TASKS
from llava_uhd.images.pixels import open_image


def encoded(width: int, height: int, seed: int) -> str:
    buffer = io.BytesIO()
    picture(width, height, seed=seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_images_are_read_where_they_lie(tmp_path: Path) -> None:
    file = tmp_path / "toy.tsv"
    two = f"['{encoded(12, 8, 1)}', '{encoded(6, 9, 2)}']"
    lines = [
        "index\tquestion\timage\tA",
        f'1\t"say ""é""\tor\nnot"\t{encoded(20, 10, 0)}\tx',
        "1000001\tagain\t1\t",
        f'3\t5" wide\t{two}\t"two" words',
        f'4\tquoted\t"{encoded(7, 7, 3)}"\tNone',
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = read_table(file, "index", "image")
    by_index = {whole_number(row["index"]): row for row in rows}
    assert [row["question"] for row in rows] == ['say "é"\tor\nnot', "again", '5" wide', "quoted"]
    assert [row["A"] for row in rows] == ["x", None, "two words", "None"]
    sizes = [[open_image(each).size for each in images_of(row, by_index)] for row in rows]
    assert sizes == [[(20, 10)], [(20, 10)], [(12, 8), (6, 9)], [(7, 7)]]
    assert images_of(rows[0], by_index) == images_of(rows[1], by_index)
    with pytest.raises(UserError, match="row '9' has no image"):
        images_of({"index": "9", "image": "77"}, by_index)


def test_damaged_tables(tmp_path: Path) -> None:
    for content, reason in [
        (b"a\tb\n1\n", "row 1: has 1 cells, the first line 2"),
        (b'a\tb\n1\t"open\n2\t3\n', "the quotes of the record at byte 4 do not end"),
        (b"a\tb\n1\t\xff\n", "row 1: is not UTF-8"),
        (b"a\tb\n1\t2\n", "has no column 'index'"),
        (b"a\tb\n", "has no rows"),
    ]:
        file = tmp_path / "bad.tsv"
        file.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_table(file, "index")
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.tsv")
    (tmp_path / "a.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="must be named"):
        read_table(tmp_path / "a.pkl")
    file = tmp_path / "cut.tsv"
    file.write_text("index\timage\n1\t" + encoded(9, 9, 0)[:-1] + "\n")
    with pytest.raises(UserError, match="the image at byte 14 of .*cut.tsv"):
        open_image(read_table(file)[0]["image"][0])


def test_predictions_as_json_and_as_workbook(tmp_path: Path) -> None:
    json_file = tmp_path / "p.json"
    json_file.write_text('[{"index": 3, "prediction": "A", "B": null}]')
    assert read_table(json_file) == [{"index": 3, "prediction": "A", "B": None}]
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    sheet = (
        f"<worksheet {space}><sheetData>"
        '<row><c r="A1" t="s"><v>0</v></c><c r="B1" t="inlineStr"><is><t>prediction</t></is></c>'
        '<c r="C1" t="s"><v>1</v></c></row>'
        '<row><c r="A2"><v>3</v></c><c r="C2" t="s"><v>2</v></c></row>'
        '<row><c r="A3" t="n"><v>4.5</v></c><c r="B3" t="str"><v>B</v></c></row>'
        "</sheetData></worksheet>"
    )
    shared = (
        f"<sst {space}><si><t>index</t></si><si><t>A</t></si>"
        "<si><r><t>a</t></r><r><t>b</t></r></si></sst>"
    )
    book = tmp_path / "p.xlsx"
    with zipfile.ZipFile(book, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", sheet)
        archive.writestr("xl/sharedStrings.xml", shared)
    assert read_table(book) == [
        {"index": 3, "prediction": None, "A": "ab"},
        {"index": 4.5, "prediction": "B", "A": None},
    ]
    book.write_bytes(b"PK")
    with pytest.raises(UserError, match="no readable workbook"):
        read_table(book)
    assert [whole_number(x) for x in ("3", 3.0, "3.0", "v1", 3, 2.5)] == [3, 3, 3, "v1", 3, 2.5]


def test_an_image_that_is_no_base64_fails_alone(tmp_path: Path) -> None:
    folder = make_mmbench(tmp_path, "mmbench", "mmbench_dev_20230712")
    path = folder / "mmbench_dev_20230712.tsv"
    head, first, second = path.read_text("utf-8").splitlines(keepends=True)
    cells = first.split("\t")
    other = [*cells]
    other[0], other[9] = "4", "!" * 100
    path.write_text(head + first + second + "\t".join(other), "utf-8")
    task = TASKS.get("mmbench")
    items = task.load(folder)
    assert len(data_digest(task, items)) == 16
    outcomes = list(Answerer(*tiny_parts(), task, Limits(2, 1, 4)).run(items))
    assert [each.id for outcome in outcomes for each in outcome.answers] == [3, 1_000_003]
    (failure,) = [each for outcome in outcomes for each in outcome.failures]
    assert failure.id == 4 and "cannot be read (Only base64 data is allowed)" in failure.reason
    other[0] = "x"
    path.write_text(head + "\t".join(other), "utf-8")
    with pytest.raises(UserError, match="row 1: index 'x' must be a whole number"):
        task.load(folder)
