import pytest

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.serve.config import ServeConfig


def test_options_win_over_the_file_and_the_rest_has_defaults(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "serve.yaml").write_text("model: model\nport: 9000\ntimeout: 5\n")
    options = ["--port", "9001", "--long-document=max_slice"]
    config = load_config(ServeConfig, str(tmp_path / "serve.yaml"), options)
    assert (config.model, config.port, config.timeout) == (str(tmp_path / "model"), 9001, 5.0)
    assert (config.host, config.long_document, config.token_file) == ("127.0.0.1", "max_slice", None)


def test_every_wrong_option_is_reported_at_once(tmp_path):
    options = f"--model {tmp_path} --port 65536 --timeout 1e308 --token_file {tmp_path}/no --token x"
    with pytest.raises(ConfigError) as caught:
        load_config(ServeConfig, None, options.split())
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--port", "--timeout", "--token_file", "--token"]


def test_the_queue_holds_at_least_one_request(tmp_path):
    with pytest.raises(ConfigError, match="^--queue_pairs: .*max_documents, which is 1000, found 999$"):
        load_config(ServeConfig, None, ["--model", str(tmp_path), "--queue_pairs", "999"])


def test_the_queue_holds_what_a_search_reranks(tmp_path):
    options = ["--index", str(tmp_path), "--queue_pairs", "1000", "--max_documents", "500", "--depth", "1001"]
    with pytest.raises(ConfigError, match="^--queue_pairs: expected at least depth, which is 1001, found 1000$"):
        load_config(ServeConfig, None, ["--model", str(tmp_path), *options])
    assert load_config(ServeConfig, None, options).depth == 1001


def test_a_server_without_a_model_names_what_it_takes():
    with pytest.raises(ConfigError, match="^--model: is missing; give model .*, embedder, index"):
        load_config(ServeConfig, None, ["--port", "0"])


def test_options_of_what_is_not_served_are_named():
    config = ServeConfig(embedder="e", name="n", long_document="max_slice", max_length=7, query_format="Q: {}")
    assert config.max_length == 7 and config.embedder_options().max_length == 7
    ignored = config.ignored
    assert all(key in ignored for key in ("name", "long_document", "query_format")) and "max_length" not in ignored
    config = ServeConfig(index="i", device="cpu", precision="fp32", embedder_name="n")
    assert "precision (only for servers with model or embedder)" in config.ignored and "device" not in config.ignored
    assert ServeConfig(model="m", precision="fp32", name="n").ignored is None
