"""Fixtures of the tests of `preprocess`."""

import pytest

from preprocess.isic2018 import NOT_IN_ARCHIVE, ONE_HOT
from tests.support.rawdata import jpeg, write_table


@pytest.fixture
def official_test(tmp_path):
    """The layout of the unpacked archives: images and one-hot labels in folders of their own; one image is missing."""
    folder = tmp_path / "test"
    images = folder / "ISIC2018_Task3_Test_Images"
    images.mkdir(parents=True)
    table = []
    for number in range(21):
        image_id = f"ISIC_003{number:04d}"
        (images / f"{image_id}.jpg").write_bytes(jpeg(number))
        hot = list(ONE_HOT)[number % 7]
        table.append({"image": image_id, **{name: str(float(name == hot)) for name in ONE_HOT}})
    table.append({"image": NOT_IN_ARCHIVE, **{name: str(float(name == "NV")) for name in ONE_HOT}})
    (folder / "ISIC2018_Task3_Test_GroundTruth").mkdir()
    write_table(folder / "ISIC2018_Task3_Test_GroundTruth" / "ISIC2018_Task3_Test_GroundTruth.csv", table)
    return folder
