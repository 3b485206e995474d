"""The wheel alone, in a fresh virtual environment outside the checkout."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import aiohttp
import pytest

from tests.journeys.conftest import REPOSITORY, ask, up_and_running, without_bkg


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, install it, and return the folder with its programs."""
    made = tmp_path_factory.mktemp("wheel")
    # Building writes beside the sources, where other tests read at the same time.
    source = made / "source"
    for folder in ("bus", "services"):
        shutil.copytree(REPOSITORY / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(made), str(source)],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    [wheel] = made.glob("*.whl")
    venv.create(made / "venv", symlinks=True)
    python = made / "venv" / "bin" / "python"
    # With the pip that is there: one more would have to be installed first.
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
         f"{wheel}[embedded,faces]"],
        check=True, cwd=made, timeout=280,
    )  # fmt: skip
    return python.parent


@pytest.mark.timeout(600)
async def test_it_runs_with_dashboard_catalogue_and_sample_models(installed, tmp_path):
    log = tmp_path / "up.log"
    data_dir = tmp_path / "data"
    with log.open("wb") as output:
        up = subprocess.Popen(
            [str(installed / "bkg"), "up", "--port", "0", "--data-dir", str(data_dir)],
            cwd=tmp_path, stdout=output, stderr=output, env=without_bkg(),
        )  # fmt: skip
    try:
        platform = await up_and_running(up, data_dir, log)
        async with platform.session() as session:
            for name in ("linear-demo.json", "iris.onnx"):
                await ask(session, "candle.model.load", id=name.partition(".")[0], path=name)
            async with session.get("/") as page:
                html = await page.text()
            assert page.status == 200
            assert 'type="module"' in html
            script = html.partition('src="')[2].partition('"')[0]
            async with session.get(script) as answer:
                assert answer.status == 200
                assert answer.content_type == "text/javascript"
        async with aiohttp.ClientSession() as anybody:
            async with anybody.get(f"{platform.url}/livez") as answer:
                assert answer.status == 200
    finally:
        up.terminate()
        assert up.wait(10) == 0, log.read_text()
