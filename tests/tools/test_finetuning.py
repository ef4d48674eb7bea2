"""Contact sheets of fine-tuning, and the tables of its results."""

import numpy as np
from PIL import Image

from tools.demo import finetuning


def test_every_row_of_a_sheet_is_labelled_and_whole(tmp_path):
    """Two ways for three prompts: six rows of five frames, twice as large, each with ink on its left."""
    noise = np.random.default_rng(0).random((3, 9, 16, 24, 3)).astype(np.float32)
    finetuning.write_sheet(tmp_path / "sheet.png", {"dense, 12 steps": noise, "tuned, 4 steps": noise}, prompts=3)
    with Image.open(tmp_path / "sheet.png") as file:
        pixels = np.asarray(file.convert("RGB"))
    assert pixels.shape == (6 * 32, finetuning.LABEL + 5 * 48, 3)
    for row in pixels.reshape(6, 32, -1, 3):
        assert (row[:, : finetuning.LABEL] < 128).any()
    twins = pixels[:, finetuning.LABEL :].reshape(3, 2, 32, -1, 3)
    assert (twins[:, 0] == twins[:, 1]).all()


def test_the_page_has_the_tables_of_the_results(root):
    page = (root / "docs" / "fine-tuning" / "measured.md").read_text(encoding="utf-8")
    tables = finetuning.table(finetuning.RESULTS)
    assert all(table in page for table in tables.split("\n\n"))
    measured = finetuning.RESULTS.read_text(encoding="utf-8").splitlines()
    assert tables.count(" tuned |") - tables.count("dense tuned |") == len(measured)
