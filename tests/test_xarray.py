"""Maps behave as xarray users expect: files, plots and selections."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from xattn import correlate
from xattn.explain import Occlusion, explain
from xattn.figures import heatmaps

pytestmark = pytest.mark.filterwarnings("ignore:The data type:FutureWarning", "ignore::UserWarning")  # Zarr's


@pytest.fixture(scope="module")
def maps(model, utterances):
    return explain(model, utterances[1], occlusion=Occlusion(40, 40, precision="float32"), progress=False)


@pytest.fixture
def closing():
    yield
    plt.close("all")


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_maps_survive_a_users_own_file(maps, tmp_path, suffix):
    path = tmp_path / f"maps.{suffix}"
    if suffix == "nc":
        maps.to_netcdf(path)
        back = xr.load_dataset(path)
    else:
        maps.to_zarr(path)
        back = xr.open_zarr(path).load()
    assert back.identical(maps)
    assert correlate(back.cross_attention, back.input_saliency).equals(
        correlate(maps.cross_attention, maps.input_saliency)
    )


def test_every_variable_can_be_plotted(maps, closing):
    assert len(maps.data_vars) >= 8
    for name, variable in maps.data_vars.items():
        plt.figure()
        assert variable.plot() is not None, name


def test_tokens_are_strings(maps):
    assert maps.token.dtype.kind == maps.word.dtype.kind == "U"


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (lambda maps: maps, ""),
        (lambda maps: maps.sel(layer=2), ", layer 2"),
        (lambda maps: maps.sel(head=1), ", head 1"),
        (lambda maps: maps.sel(layer=[1], head=[2]), ", layer 1, head 2"),
        (lambda maps: maps.isel(token=slice(0, 3)), ""),
        (lambda maps: maps.sel(time=slice(0.1, 0.3)), ", 0.10 to 0.30 s"),
        (lambda maps: maps.sel(time=slice(0.1, 0.3), step=slice(0.1, 0.3)), ", 0.10 to 0.30 s"),
        (lambda maps: maps.sel(step=slice(0.1, 0.3)), ""),
    ],
    ids=["all", "layer", "head", "lists", "tokens", "time", "time and step", "step"],
)
def test_selections_are_drawn_and_correlated_and_the_title_names_them(maps, closing, selection, said):
    selected = selection(maps)
    title = heatmaps(selected)._suptitle.get_text()
    assert title == f"{maps.model}, en, {maps.utterance}{said}"
    for saliency in (selected.input_saliency, selected.encoder_saliency):
        rho = correlate(selected.cross_attention, saliency)
        assert all(np.isfinite(each).all() and (np.abs(each) <= 1).all() for each in rho.data_vars.values())


def test_a_single_token_is_drawn_and_its_correlation_refused(maps, closing):
    heatmaps(maps.isel(token=1))
    one = maps.isel(token=1)
    with pytest.raises(ValueError, match="select several tokens"):
        correlate(one.cross_attention, one.input_saliency)
