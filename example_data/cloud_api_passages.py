"""Chinese questions and passages from the API comments of the Tencent Cloud SDK for Python (Apache 2.0).

Each API action has a comment that says what it does (本接口（CreateSubnet）用于创建子网。) and one per
parameter. The first sentence, turned into a question, is the query; the passage is the rest of the comment
and the parameters, without the first sentence. What a reader would get wrong: of actions whose passages are
nearly the same (one parameter, 实例ID) all but the first are dropped, else one would be a wrong negative of
another.
"""

import ast
import html
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"vpc": "3.1.193", "cvm": "3.1.178", "cdb": "3.1.192"}  # product: the version used here
MAX_CHARACTERS = 200
MIN_CHARACTERS = 40
SAME_PASSAGE = 0.7  # share of common character pairs (Jaccard) from which two passages count as the same

PREAMBLE = re.compile(
    r"^(本接口|该接口|此接口|接口)?\s*[（(]?\s*[A-Za-z0-9]*\s*[）)]?\s*[，,]?\s*"
    r"(主要)?(是)?(用于|用来|可以|，)?\s*"
)
VERBS = re.compile(  # "怎么" before a sentence makes a question only where the sentence begins with a verb
    r"^(批量|主动|跨账号)?"
    r"(查询|查看|获取|创建|新建|修改|更改|更新|调整|变更|设置|配置|删除|释放|退还|绑定|解绑|解除|关联|取消|添加|增加|新增|"
    r"移除|开启|关闭|启用|禁用|启动|停止|重启|重置|升级|续费|购买|申请|分配|迁移|检查|校验|导出|导入|下载|上传|拒绝|接受|"
    r"替换|刷新|清理|恢复|克隆|切换|隔离|销毁|终止|暂停|复制|同步|加入|退出|回收|转换|生成|判断|验证|扩容|重装)"
)


@dataclass(frozen=True)
class ApiPassage:
    """One API action: what a user would ask, and the passage that answers."""

    name: str
    query: str
    document: str


def api_passages() -> list[ApiPassage]:
    """All actions with a usable question, sorted by name, no two passages alike."""
    kept: list[tuple[ApiPassage, set[str]]] = []
    queries = set()
    for name, comment, parameters in sorted(_actions()):
        passage = _passage(name, comment, parameters)
        if passage is None or passage.query in queries:
            continue
        pairs = {passage.document[i : i + 2] for i in range(len(passage.document) - 1)}
        if all(len(pairs & other) < SAME_PASSAGE * len(pairs | other) for _, other in kept):
            kept.append((passage, pairs))
            queries.add(passage.query)
    return [passage for passage, _ in kept]


def _actions() -> Iterator[tuple[str, str, str]]:
    """(name, comment, parameters as text) of each action; the sources are parsed, nothing is imported."""
    spec = importlib.util.find_spec("tencentcloud")
    for product, version in PACKAGES.items():
        folders = [Path(place) / product for place in spec.submodule_search_locations] if spec else []
        clients = [client for folder in folders for client in sorted(folder.glob(f"v*/{product}_client.py"))]
        if not clients:
            package = f"tencentcloud-sdk-python-{product}=={version}"
            raise SystemExit(f"{package} is not installed; run: pip install --no-deps {package}")
        for client in clients:
            requests = _classes(client.with_name("models.py"))
            for node in next(iter(_classes(client).values())).body:
                if isinstance(node, ast.FunctionDef) and node.name + "Request" in requests:
                    comment = (ast.get_docstring(node) or "").partition(":param")[0]
                    yield f"{product}.{node.name}", comment, _parameters(requests[node.name + "Request"])


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _parameters(request: ast.ClassDef) -> str:
    """The constructor's comment, `名称：说明` one after another."""
    init = next((node for node in request.body if isinstance(node, ast.FunctionDef)), None)
    comment = (ast.get_docstring(init) or "") if init else ""
    found = re.findall(r":param _(\w+): (.*?)\s*\n\s*:type", comment, re.S)
    return "\n".join(f"{name}：{_plain(text)}" for name, text in found)


def _passage(name: str, comment: str, parameters: str) -> ApiPassage | None:
    """None where the first sentence is no question's worth or too little remains to answer with."""
    first, rest = (*re.split("[。\n]", _plain(comment), maxsplit=1), "")[:2]
    wish = PREAMBLE.sub("", first).strip(" ，,.：:")
    document = _cut(re.sub(r"\bhttps?://\S+", "", f"{rest}\n{parameters}".strip()))
    if not VERBS.match(wish) or not 4 <= len(wish) <= 40 or len(document) < MIN_CHARACTERS:
        return None
    return ApiPassage(name, f"怎么{wish}？", document)


def _plain(text: str) -> str:
    """Without HTML tags, Markdown links and emphasis, and the names of other actions' pages."""
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?m)^([>*?\- ]+|\d\.\s+)", "", text.replace("`", "").replace("**", ""))
    return re.sub(r"[ \t]*\n\s*", "\n", text).strip()


def _cut(text: str) -> str:
    """At most MAX_CHARACTERS, ending at a sentence or line where one is near."""
    if len(text) <= MAX_CHARACTERS:
        return text
    head = text[:MAX_CHARACTERS]
    end = max(head.rfind("。") + 1, head.rfind("\n"))
    return head[: end if end > MAX_CHARACTERS // 2 else MAX_CHARACTERS].rstrip()
