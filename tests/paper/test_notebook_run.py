import json

from matplotlib.figure import Figure

from dctlib.paper.notebook_run import NotebookRun


def test_it_leaves_figures_and_numbers_under_its_profile(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    run = NotebookRun("curves", "smoke")
    figure = Figure()
    shown = run.save_figure(figure)
    assert shown.data == (tmp_path / "figures" / "smoke" / "curves.png").read_bytes()
    run.save_figure(figure, "scores")
    run.save_results({"mean": 1.5})
    left = tmp_path / "figures" / "smoke"
    assert {path.name for path in left.iterdir()} == {
        "curves.json",
        "curves.png",
        "curves.svg",
        "curves_scores.png",
        "curves_scores.svg",
    }
    results = json.loads((left / "curves.json").read_text())
    assert results["mean"] == 1.5
    assert 0 < results["seconds"] < 60
    assert run.folder(".cache").resolve() == tmp_path / ".cache" / "smoke"
