"""Charts of a run in training show the losses of whatever method is trained."""

from guided_diffusion.draw import plots


def test_progress_shows_the_losses_that_it_is_told_of_and_all_scores(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "png", figures.append)
    losses = ["loss", *(f"part{i}" for i in range(5))]
    rows = [{"step": step, "val_GED_16": 0.5, "other": 1.0, **dict.fromkeys(losses, 2.0 - step)} for step in range(2)]
    plots.progress_figure(rows, losses)
    left, middle, _ = ([line.get_label() for line in axes.lines] for axes in figures[0].axes)
    assert left == losses and middle == ["val_GED_16"]
    colours = [line.get_color() for line in figures[0].axes[0].lines]
    assert len(set(colours)) == len(losses)
