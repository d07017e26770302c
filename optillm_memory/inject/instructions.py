"""Texts that read like instructions to a model. As an earlier turn such a text would speak with the user's voice, or the assistant's.

This is no defence by itself (who writes for it will get by it), and costs little where it errs: an exemplar that is found
here is quoted in a block, whose lines are marked as data. The forms are those of published attacks (Liu et al. 2024,
"Formalizing and Benchmarking Prompt Injection Attacks and Defenses") in some twenty languages, and the role markers of
chat templates.
"""

from __future__ import annotations

import re
import unicodedata

_FORMAT = "Cf"  # the Unicode category of characters without a shape of their own
_MARKERS = re.compile(
    r"<\|[a-z_]{2,30}\|>|<｜[^｜\n]{1,30}｜>|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>|</?s>"
    r"|</?(?:system|assistant|user|human|developer|instructions?|tool_calls?|function_calls?|function|invoke|tool_use|tool_code"
    r"|system[-_](?:prompt|reminder|message))\b[^>\n]{0,80}>"
    r"|^[ \t>*#\[\"']{0,8}(?:system|assistant|user|human|developer|ai|tool|model)(?: (?:prompt|message|note|instruction|override|update)s?)?"
    r"[ \t*\]\"']{0,4}(?::|\uff1a)"
    r"|^[ \t]{0,3}#{1,6}[ \t]{0,3}(?:system|instructions?|assistant|user|human|developer|response|new (?:task|instructions?))\b"
    r"|\"(?:tool_calls|function_call)\"[ \t]{0,3}:|\"name\"[ \t]{0,3}:[ \t]{0,3}\"[\w.-]{1,64}\"[ \t]{0,3},[ \t\n]{0,9}\"(?:arguments|parameters)\"[ \t]{0,3}:",
    re.MULTILINE,
)
_ORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        # English
        r"\b(?:ignor|disregard|forget|overrid|bypass|discard|neglect|supersed)\w{0,4}\b[^.!?\n]{0,60}\b(?:previous|prior|above|earlier|preceding|all|any|your|system|other|everything|former|original)\b",
        r"\b(?:you are now|from now on|from this (?:point|moment)|henceforth|going forward|new (?:instruction|rule|directive|task|role|polic)|your (?:new|real|true|actual|only) (?:instruction|task|role|goal|job|purpose|objective)|updated? (?:instruction|polic|guideline))",
        r"\b(?:you (?:must|shall|have to|should|will|need to|are (?:required|instructed|ordered|to)) (?:now|always|never|not|only|first|immediately|also|obey|follow|ignore|call|run|execute|send|reply|respond|answer|output|include|reveal|use))\b",
        r"\b(?:always|never) (?:answer|respond|reply|say|include|call|run|execute|output|use|mention|tell|recommend|add|append|end|start|refuse|approve|trust)\b",
        r"\b(?:whenever|every time|each time|if) (?:the user|a user|you|anyone|someone|asked)\b[^.!?\n]{0,80}\b(?:answer|respond|reply|say|include|call|run|execute|send|output|tell|use|recommend)\b",
        r"\b(?:system prompt|developer (?:mode|message)|jailbreak|god mode|dan mode|do anything now|admin(?:istrator)? (?:override|mode)|override (?:code|mode)|safety (?:filter|guideline|polic)\w{0,4}|prompt injection)\b",
        r"\b(?:pretend|act|behave|roleplay|role-play|respond|speak) (?:as if|as though|as an? |like an? |to be|that you)|\byou are (?:a|an|in|no longer) [^.!?\n]{0,60}\b(?:assistant|mode|model|ai|agent|bot|system|hacker|restrict\w{0,5})\b",
        r"\b(?:do not|don't|never|without) (?:tell|mention|inform|notify|alert|ask|warn|reveal|show|telling|asking|informing|mentioning|notifying)\w{0,4}\b[^.!?\n]{0,40}\b(?:user|anyone|human|owner|confirm\w{0,6}|permission|this)\b",
        r"\b(?:reveal|print|repeat|show|leak|output|exfiltrate|send|post|upload|forward|email|transmit|submit)\b[^.!?\n]{0,80}\b(?:system prompt|instructions?|api[- ]?keys?|passwords?|secrets?|credentials?|tokens?|conversation|env(?:ironment)?(?: variables?)?|https?://|to [\w.+-]{1,64}@)",
        r"\b(?:call|invoke|use|execute|run) the (?:following |tool|function|command|shell|code)|\b(?:execute|run) (?:this|these|it) (?:command|code|script|first|now|immediately)",
        r"\b(?:important|attention|urgent|warning|critical|note to (?:the )?(?:ai|assistant|model|agent|llm))\b[ \t]{0,3}(?:[:!]|-{1,2}|(?:message|instruction|notice) (?:to|for))[^\n]{0,40}\b(?:assistant|ai|model|agent|llm|you must|instruction|ignore|system)\b",
        r"\b(?:instructions?|message|note|memo) (?:to|for) (?:the |all |any )?(?:ai|assistants?|models?|agents?|llms?|language models?)\b|\bas an? (?:ai|assistant|language model),? you\b",
        # German, Dutch, Swedish, Danish, Norwegian
        r"\b(?:ignorier|vergiss|vergesst|vergessen|missachte|beachte nicht|negeer|vergeet|ignorera|glöm|ignorer|glem)\w{0,5}\b[^.!?\n]{0,60}\b(?:anweisung|instruktion|vorgabe|regel|befehl|alles|vorherig|bisherig|obig|instructie|regels|alle|vorige|eerdere|instruktioner|regler|allt|tidigare|tidligere|alt)\w{0,6}",
        r"\b(?:du bist (?:jetzt|nun|ab)|sie sind (?:jetzt|nun)|ab (?:sofort|jetzt)|von nun an|deine neue|vanaf nu|je bent nu|från och med nu|du är nu|fra nå av|fra nu af)\b",
        # French, Spanish, Portuguese, Italian, Romanian, Catalan
        r"\b(?:ignor|oubli|olvid|descart|desconsider|esque[cç]|dimentic|ometti|omit|ne (?:tiens|tenez) pas compte|no (?:hagas|haga) caso|n[ãa]o (?:siga|considere))\w{0,5}\b[^.!?\n]{0,60}\b(?:instruc|consigne|r[èe]gle|regla|regra|regol|istruzion|instru[cç]|indicacion|ordres|tout ce|todo|tudo|tutto|pr[ée]c[ée]dent|anterior|precedent)\w{0,6}",
        r"\b(?:tu es (?:maintenant|d[ée]sormais)|vous [êe]tes (?:maintenant|d[ée]sormais)|[àa] partir de (?:maintenant|ahora|agora)|d[ée]sormais,|ahora eres|de ahora en adelante|agora voc[êe] [ée]|ora sei|d'ora in poi|da ora in poi|de acum)\b",
        # Russian, Ukrainian, Polish, Czech, Turkish, Vietnamese, Indonesian
        r"(?:игнорир|забудь|забудьте|не обращай|ігнор|забудь)\w{0,6}[^.!?\n]{0,60}(?:инструкц|указан|правил|предыдущ|інструкц|вказівк|вс[её])\w{0,5}|\b(?:теперь ты|отныне|с этого момента|відтепер|тепер ти)\b",
        r"\b(?:zignoruj|ignoruj|zapomnij|pomi[ńn]|zapome[ňn])\w{0,4}\b[^.!?\n]{0,60}\b(?:instrukcj|polece|zasad|wszystk|poprzedni|pokyn|p[řr]edchoz)\w{0,5}|\b(?:od teraz|jeste[śs] teraz|od nyn[ěe]jška)\b",
        r"talimat\w{0,8}[^.!?\n]{0,40}(?:yok say|görmezden|unut|dikkate alma)|\b(?:şu andan itibaren|bundan sonra|artık sen)\b|(?:bỏ qua|quên)[^.!?\n]{0,40}(?:hướng dẫn|chỉ dẫn|lệnh)|\b(?:từ bây giờ|mulai sekarang)\b|\b(?:abaikan|lupakan)\b[^.!?\n]{0,40}\b(?:instruksi|perintah|aturan)",
        # Chinese, Japanese, Korean, Arabic, Hebrew, Hindi
        r"(?:忽略|无视|忘记|忽視|無視|忘掉|不要理会|请勿遵守)[^。！？\n]{0,20}(?:指令|指示|提示|规则|規則|说明|說明|内容|一切)|(?:你现在是|你現在是|从现在开始|從現在開始|从现在起|從現在起|系统提示|系統提示)",
        r"(?:以前|上記|これまで|今まで|前|すべて|全て)[^。！？\n]{0,12}(?:指示|命令|ルール|プロンプト)[^。！？\n]{0,10}(?:無視|忘れ|破棄)|(?:これからは|今後は|あなたは今|今からあなた|システムプロンプト)",
        r"(?:이전|위의|앞의|모든|기존)[^.!?\n]{0,16}(?:지시|명령|지침|규칙|프롬프트)[^.!?\n]{0,12}(?:무시|잊)|(?:너는 이제|당신은 이제|지금부터)",
        r"(?:تجاهل|انس|تجاوز)[^.!؟\n]{0,40}(?:التعليمات|الأوامر|القواعد|السابق)|(?:أنت الآن|من الآن فصاعد)|(?:התעלם|שכח)[^.!?\n]{0,30}(?:הוראות|ההנחיות)|(?:निर्देश)[^।!?\n]{0,30}(?:अनदेखा|नज़रअंदाज़|भूल|उपेक्षा)|अब से",
    )
)
_LOOKED_AT = 20_000  # characters: a longer text is no exemplar


def reads_like_instructions(text: str) -> bool:
    """Whether a text reads like instructions to a model, or like a part of a prompt: a role, a call of a tool."""
    asked = text.removeprefix("User: ")  # optillm's batch mode writes that before what each user asked
    normal = unicodedata.normalize("NFKC", asked[:_LOOKED_AT])
    if not normal.isascii():
        normal = "".join(c for c in normal if unicodedata.category(c) != _FORMAT)
    normal = normal.casefold()
    words = " ".join(normal.split())
    return _MARKERS.search(normal) is not None or any(order.search(words) for order in _ORDERS)
