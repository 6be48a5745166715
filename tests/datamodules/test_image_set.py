"""An image set has a label for each image, and each label is one of its classes."""

import pytest
import torch

from ravine.datamodules.image_set import ImageSet, parse_class_indices
from ravine.errors import UsageError


def test_a_label_beyond_the_classes_is_refused() -> None:
    images, names = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), ("a", "b")
    with pytest.raises(ValueError, match="the label of image 1 is 7; allowed: 0 to 1"):
        ImageSet(images, torch.tensor([0, 7, 1]), names).validated("x")
    with pytest.raises(ValueError, match="the label of image 2 is -1; allowed: 0 to 1"):
        ImageSet(images, torch.tensor([0, 1, -1]), names).validated("x")
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        ImageSet(images, torch.tensor([0, 1]), names).validated("x")


def test_classes_are_given_by_name_or_by_number() -> None:
    names = ("cat", "dog", "T-shirt", "ankle boot")
    for words, expected in {
        "cat,dog": [0, 1], "3,T-shirt": [3, 2], "0-2": [0, 1, 2], "T-shirt": [2],
        "ankle boot, 0": [3, 0], "1": [1],
    }.items():  # fmt: skip
        assert parse_class_indices(words, names, "--labels") == expected
    assert parse_class_indices([1, "cat"], names, "--labels") == [1, 0]
    years = ("1990", "2000", "2010")  # a name of digits means the class of that name
    assert parse_class_indices("2000,1990-2010,1", years, "--labels") == [1, 0, 1, 2, 1]
    said = "'cow' is not a class; allowed: 0 cat, 1 dog, 2 T-shirt, 3 ankle boot; use labels='0-3'"
    with pytest.raises(UsageError, match=said) as error:
        parse_class_indices("cow", names, "--labels")
    assert error.value.flag == "--labels=0-3"
    with pytest.raises(ValueError, match="labels='4' is not in the classes; allowed: 0 cat"):
        parse_class_indices("4", names, "--labels")
    with pytest.raises(ValueError, match=r"'999.*' is not a class"):
        parse_class_indices("9" * 5000, names, "--labels")
