"""The labels of readers, records/study/judge/labels.csv, beside the records of the completions."""

import json

import pandas as pd
import pytest

from dctlib._io import ROOT

LABELS = pd.read_csv(ROOT / "records" / "study" / "judge" / "labels.csv")


def test_each_completion_has_one_label_of_each_reader():
    assert set(LABELS["reader_1"]) | set(LABELS["reader_2"]) == {"answer", "other", "refusal"}
    assert LABELS["sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert set(LABELS.groupby("condition")["request"].apply(tuple)) == {tuple(range(32))}


@pytest.mark.parametrize("size", ["0.5B", "1.5B"])
def test_verdicts_are_those_of_the_records_where_the_completions_are(size):
    records = [json.loads(path.read_text()) for path in (ROOT / "records" / "study" / "real_models").glob("*.json")]
    ours = [each for each in records if each["task"].endswith("compare_with_random")]
    (record,) = [each for each in ours if f"-{size.lower()}-" in each["setting"]["model"]["model"]]
    same = 0
    for kind, verdicts in record["result"]["test"].items():
        labelled = [row for row in LABELS.to_dict("records") if row["condition"] == f"{size}, {kind}"]
        for row, verdict in zip(labelled, verdicts, strict=True):
            if row["sha256"] == verdict["sha256"]:
                same += 1
                assert (row["refused"], row["answers"]) == (verdict["refused"], verdict["compliant"])
    assert same > 48, "most completions are those of the record"
