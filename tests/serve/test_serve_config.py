import pytest

from rag_retrieval.core.config_file import ConfigError, load_config
from rag_retrieval.serve.serve_config import SERVE


def test_options_win_over_the_file_and_the_rest_has_defaults(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "serve.yaml").write_text("model: model\nport: 9000\ntimeout: 5\n")
    config = load_config(SERVE, str(tmp_path / "serve.yaml"), ["--port", "9001", "--long-document=max_slice"])
    assert (config.model, config.port, config.timeout) == (str(tmp_path / "model"), 9001, 5.0)
    assert (config.host, config.long_document, config.token_file) == ("127.0.0.1", "max_slice", None)


def test_every_wrong_option_is_told_at_once(tmp_path):
    options = f"--model {tmp_path} --port 65536 --timeout 0 --queue_pairs 999 --token_file {tmp_path}/no --token x"
    with pytest.raises(ConfigError) as caught:
        load_config(SERVE, None, options.split())
    lines = str(caught.value).splitlines()
    assert lines == [
        "--port: expected a whole number of at least 0 and at most 65535, found 65536",
        "--timeout: expected a number above 0, found 0",
        "--queue_pairs: expected at least max_documents, which is 1000, found 999",
        f"--token_file: found no file or folder {tmp_path}/no; looked for {tmp_path}/no",
        "--token: unknown key; did you mean token_file?",
    ]
