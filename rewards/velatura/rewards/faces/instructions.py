"""What an instruction means for the faces of its source, by words; English and Chinese.

A clause is read at a time, up to a comma or a full stop. Words in other languages are not understood: say it in the
metadata of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CLAUSES = re.compile("[.;,!?\n\u3002\uff0c\uff1b\uff01\uff1f]")
PERSON = (
    r"(?:person|people|persons|man|men|woman|women|boys?|girls?|guys?|lady|ladies|child|children|kids?|baby|babies|faces?"
    r"|heads?|subjects?|everyone|everybody|him|them|her)"
)
STOP = (
    r"(?=\s*(?:$|[)\"]|and\b|from\b|in\b|on\b|at\b|with\b|who\b|that\b|to\b|behind\b|beside\b|next\b|near\b|by\b|for\b"
    r"|standing\b|sitting\b|walking\b|wearing\b|holding\b|looking\b|entirely\b|completely\b|so\b|but\b))"
)
"""What may follow a person that is meant as a whole: in `the face mask` and `the man's hat` something else is meant."""
GAP = r"(?:(?!(?:from|of|off|on|in|near|around|behind|to|with|by|at|into|and|next|like)\b)[\w-]+\s+){0,5}"
"""Words between a verb and what it is done to."""
WHOLE = rf"\s+{GAP}{PERSON}{STOP}"
ELSEWHERE = re.compile(
    r"\b(?:background|wall|sky|floor|shirt|dress|jacket|hat|mug|logo|poster|frame|sign|screen|book|table|tattoo)\b"
)
"""Clauses that restyle one of these, or put something on it, leave the faces alone."""
STYLES = (
    r"(?:cartoon|anime|manga|comic|caricature|chibi|pixar|disney|ghibli|simpsons?|lego|minecraft|pixel[- ]art|sketch"
    r"|drawing|doodle|line[- ]art|painting|painted|water\s?colou?r|gouache|charcoal|engraving|woodcut|etching|mosaic"
    r"|stained[- ]glass|origami|sculpture|statue|figurine|action figure|plush\w*|puppet|doll|claymation|voxel"
    r"|low[- ]poly|8[- ]bit|emoji|sticker|3d (?:render\w*|model)|illustration|pop[- ]art|cubis[tm]"
    r"|impressionis[tm]|van gogh|picasso)"
)
VERBS = (
    r"(?:make|turn|render|re-?draw|draw|paint|convert|transform|re-?style|change|re-?imagine|re-?create|depict|show)"
)

CHANGES: Mapping[str, re.Pattern[str]] = {
    "removes": re.compile(
        rf"\b(?:remove|delete|erase|get rid of|take out|crop out|cut out|eliminate){WHOLE}"
        r"|(?:移除|去掉|删除|删掉|去除|擦除|抹去|消除)(?:(?:照片|图片|图像|画面)[里中上]?的?)?[^的]{0,6}(?:人|男孩|女孩|孩子|脸|头|他们?|她们?)(?!物?的|脸?上)"
    ),
    "replaces": re.compile(
        rf"\b(?:replace|swap|switch|exchange|substitute){WHOLE}|\bface[- ]?swap\b"
        rf"|\b(?:turn|change|transform|convert|morph)\s+{GAP}{PERSON}\s+in?to\s+(?!the (?:left|right|camera))"
        r"|换脸|(?:替换|换掉)[^的]{0,6}(?:人|脸|头)|(?:人|脸|头|他|她)换成"
    ),
    "hides": re.compile(
        rf"\b(?:cover|hide|conceal|obscure|blur|pixelate|censor|mask){WHOLE}|\bblur out\b[\w ]*\bfaces?\b"
        r"|\b(?:wear|wears|wearing|put|puts|putting|add|give|gives|place|with)\b.*\b(?:masks?|helmet|balaclava|veil|niqab|visor"
        r"|sunglasses|goggles|blindfold|face paint)\b"
        r"|(?:戴|带)[^的]{0,6}(?:面具|口罩|头盔|面纱|墨镜|太阳镜|护目镜|头套)|(?:遮住|挡住|遮挡|模糊|打码)[^的]{0,6}(?:脸|面|人|头)"
    ),
    "turns": re.compile(
        r"\b(?:from behind|from the back|back view|rear view|back of (?:his|her|their|the) head|silhouettes?)\b"
        r"|\b(?:turn|turns|turned|turning|look|looks|looking|face|faces|facing)\b[\w ]*\b(?:around|away|backwards?)\b"
        r"|\b(?:turn|turns|turned|with)\b[\w ]*\b(?:his|her|their) backs?\b"
        r"|背对|转过身|转身|背影|从背后|从后面"
    ),
    "ages": re.compile(
        rf"\b(?:older|younger|elderly|teenager|toddler)\b|\b(?:age|de-?age)\s+{GAP}{PERSON}"
        r"|\bgender\b|\byears? (?:old|older|younger)\b"
        r"|\bas (?:a|an) (?:old |young )?(?:child|kid|baby|man|woman)\b|\binto (?:a|an) (?:child|kid|baby|man|woman)\b"
        r"|变老|变年轻|年轻化|性别|变成.{0,4}(?:小孩|婴儿|老人|男人|女人|男性|女性)"
    ),
}
"""What is done to a face so that it cannot, or need not, be recognised afterwards."""
LOOK = (
    r"(?:(?!(?:from|of|off|on|in|near|around|behind|beside|to|with|by|at|into|and|next|front|holding|looking)\b)"
    rf"[\w-]+ ){{0,3}}{STYLES}\b"
)
"""A style with a few words before it, none of which makes it a thing in the picture."""
WHOLE_PICTURE = rf"(?:{PERSON}|it|this|image|photo|photograph|picture|portrait|scene|everything)"
THINGS = r"(?:add|put|insert|place|include|remove|delete|hang|give|hold|holding|keep|the|a|an|no)"
"""Words before a style that make it a thing, also in a clause that says nothing else."""
CHINESE_STYLES = (
    "(?:卡通|动漫|漫画|油画|水彩|素描|插画|像素|乐高|雕像|手办|粘土|黏土|吉卜力|皮克斯|迪士尼|版画|国画|水墨|简笔画|3D)"
)
STYLISES = re.compile(
    rf"\bstyli[sz]e|\b{STYLES}[- ](?:\w+ )?(?:style|version|look|effect|filter)\b|\bin (?:the )?style of\b"
    rf"|\b(?:into|as|like) (?:(?:a|an|the) )?{LOOK}"
    rf"|\b{VERBS}\b.*(?<!next )(?<!close )(?<!closer )\bto an? {LOOK}|\b{VERBS}\b.*\bin {STYLES}\b"
    rf"|\b(?:make|turn|render)\s+{GAP}{WHOLE_PICTURE}\s+an? {LOOK}"
    rf"|^(?:an? )?(?:(?!{THINGS}\b)[\w-]+ ){{0,2}}{STYLES}$"
    rf"|{CHINESE_STYLES}.{{0,2}}(?:风|版|化|效果|形象)|(?:成|为|像|用|以).{{0,6}}{CHINESE_STYLES}"
    rf"|^(?:一张|一幅)?{CHINESE_STYLES}[画图]?$"
)
"""The picture, or who is in it, becomes one of these; that one stands or hangs in it does not count."""
ADDS = re.compile(
    rf"\b(?:add|insert|include|put|place)\s+(?:{GAP}){PERSON}{STOP}"
    r"|(?:添加|加上|增加|加入)[^的]{0,8}(?:人|男孩|女孩|孩子)"
)


def changed(text: str) -> str:
    """What an instruction does to faces, a word of `CHANGES` or `stylises`; empty where it leaves them recognisable."""
    for clause in clauses(text):
        elsewhere = ELSEWHERE.search(clause)
        for name, pattern in CHANGES.items():
            if pattern.search(clause) and not (name == "hides" and elsewhere):
                return name
        if STYLISES.search(clause) and not elsewhere:
            return "stylises"
    return ""


def adds_people(text: str) -> bool:
    """Whether an instruction asks for more people than there are."""
    return any(ADDS.search(clause) for clause in clauses(text))


def clauses(text: str) -> list[str]:
    """Its clauses, in lower case, with single spaces."""
    return [" ".join(part.lower().split()) for part in CLAUSES.split(text) if part.strip()]
