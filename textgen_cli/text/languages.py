"""Languages by name and by the codes that translation models know.

Sources: FLORES-200's list of languages (NLLB), fairseq's lists for M2M100 and mBART-50, and the names of Tatoeba's
target languages as Marian's vocabularies spell them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Codes = Literal["flores", "m2m", "mbart"]


@dataclass(frozen=True)
class Language:
    """A language; a code is "" where that family of models lacks it."""

    name: str
    iso: str  # ISO 639-1, or 639-3 where there is none
    flores: str
    mbart: str
    m2m: str


# Name | ISO | FLORES-200 | mBART-50. M2M100 uses the ISO code, save where NO_M2M says that it lacks it.
_TABLE = """
Afrikaans | af | afr_Latn | af_ZA
Albanian | sq | als_Latn |
Amharic | am | amh_Ethi |
Arabic | ar | arb_Arab | ar_AR
Armenian | hy | hye_Armn |
Assamese | as | asm_Beng |
Azerbaijani | az | azj_Latn | az_AZ
Basque | eu | eus_Latn |
Belarusian | be | bel_Cyrl |
Bengali | bn | ben_Beng | bn_IN
Bhojpuri | bho | bho_Deva |
Bosnian | bs | bos_Latn |
Bulgarian | bg | bul_Cyrl |
Burmese | my | mya_Mymr | my_MM
Cantonese | yue | yue_Hant |
Catalan | ca | cat_Latn |
Cebuano | ceb | ceb_Latn |
Chinese | zh | zho_Hans | zh_CN
Croatian | hr | hrv_Latn | hr_HR
Czech | cs | ces_Latn | cs_CZ
Danish | da | dan_Latn |
Dutch | nl | nld_Latn | nl_XX
English | en | eng_Latn | en_XX
Esperanto | eo | epo_Latn |
Estonian | et | est_Latn | et_EE
Filipino | tl | tgl_Latn | tl_XX
Finnish | fi | fin_Latn | fi_FI
French | fr | fra_Latn | fr_XX
Galician | gl | glg_Latn | gl_ES
Georgian | ka | kat_Geor | ka_GE
German | de | deu_Latn | de_DE
Greek | el | ell_Grek |
Gujarati | gu | guj_Gujr | gu_IN
Haitian Creole | ht | hat_Latn |
Hausa | ha | hau_Latn |
Hebrew | he | heb_Hebr | he_IL
Hindi | hi | hin_Deva | hi_IN
Hungarian | hu | hun_Latn |
Icelandic | is | isl_Latn |
Igbo | ig | ibo_Latn |
Indonesian | id | ind_Latn | id_ID
Irish | ga | gle_Latn |
Italian | it | ita_Latn | it_IT
Japanese | ja | jpn_Jpan | ja_XX
Javanese | jv | jav_Latn |
Kannada | kn | kan_Knda |
Kazakh | kk | kaz_Cyrl | kk_KZ
Khmer | km | khm_Khmr | km_KH
Korean | ko | kor_Hang | ko_KR
Kurdish | ku | kmr_Latn |
Lao | lo | lao_Laoo |
Latvian | lv | lvs_Latn | lv_LV
Lithuanian | lt | lit_Latn | lt_LT
Luxembourgish | lb | ltz_Latn |
Macedonian | mk | mkd_Cyrl | mk_MK
Malagasy | mg | plt_Latn |
Malay | ms | zsm_Latn |
Malayalam | ml | mal_Mlym | ml_IN
Maltese | mt | mlt_Latn |
Marathi | mr | mar_Deva | mr_IN
Mongolian | mn | khk_Cyrl | mn_MN
Nepali | ne | npi_Deva | ne_NP
Norwegian | no | nob_Latn |
Odia | or | ory_Orya |
Pashto | ps | pbt_Arab | ps_AF
Persian | fa | pes_Arab | fa_IR
Polish | pl | pol_Latn | pl_PL
Portuguese | pt | por_Latn | pt_XX
Punjabi | pa | pan_Guru |
Romanian | ro | ron_Latn | ro_RO
Russian | ru | rus_Cyrl | ru_RU
Scottish Gaelic | gd | gla_Latn |
Serbian | sr | srp_Cyrl |
Shona | sn | sna_Latn |
Sindhi | sd | snd_Arab |
Sinhala | si | sin_Sinh | si_LK
Slovak | sk | slk_Latn |
Slovenian | sl | slv_Latn | sl_SI
Somali | so | som_Latn |
Spanish | es | spa_Latn | es_XX
Sundanese | su | sun_Latn |
Swahili | sw | swh_Latn | sw_KE
Swedish | sv | swe_Latn | sv_SE
Tamil | ta | tam_Taml | ta_IN
Telugu | te | tel_Telu | te_IN
Thai | th | tha_Thai | th_TH
Traditional Chinese | zh-Hant | zho_Hant |
Turkish | tr | tur_Latn | tr_TR
Ukrainian | uk | ukr_Cyrl | uk_UA
Urdu | ur | urd_Arab | ur_PK
Uzbek | uz | uzn_Latn |
Vietnamese | vi | vie_Latn | vi_VN
Welsh | cy | cym_Latn |
Xhosa | xh | xho_Latn | xh_ZA
Yiddish | yi | ydd_Hebr |
Yoruba | yo | yor_Latn |
Zulu | zu | zul_Latn |
"""
NO_M2M = frozenset({"as", "bho", "eo", "eu", "ku", "mt", "sn", "te", "yue", "zh-Hant"})
OTHER_NAMES = {"farsi": "fa", "tagalog": "tl", "mandarin": "zh", "simplified chinese": "zh", "oriya": "or"}


def _language(row: str) -> Language:
    name, iso, flores, mbart = (cell.strip() for cell in row.split("|"))
    return Language(name, iso, flores, mbart, "" if iso in NO_M2M else iso)


LANGUAGES = tuple(_language(row) for row in _TABLE.strip().splitlines())

_BY_WORD = {
    word.casefold(): language
    for language in LANGUAGES
    for word in (language.name, language.iso, language.flores, language.mbart)
    if word
}
_BY_WORD |= {name: _BY_WORD[iso] for name, iso in OTHER_NAMES.items()}


def language(word: str) -> Language | None:
    """The language of a name or of any of its codes; None where the table has none."""
    return _BY_WORD.get(word.strip().casefold())


def code(word: str, codes: Codes) -> str | None:
    """The code that models of this kind use; None for a language they lack."""
    found = language(word)
    return getattr(found, codes) or None if found else None


# Languages that Marian's vocabularies call by another ISO 639-3 code than FLORES-200 does.
_TATOEBA = {
    "ar": "ara",
    "az": "aze_Latn",
    "lv": "lav",
    "mn": "mon",
    "ms": "zsm_Latn",
    "ne": "nep",
    "sq": "sqi",
}
_TATOEBA |= {"ps": "pus", "uz": "uzb_Latn", "zh": "cmn_Hans", "zh-Hant": "cmn_Hant"}


def tag(word: str, tags: Collection[str]) -> str | None:
    """The token, such as `>>fra<<` or `>>fr<<`, by which a Marian model of several targets is told one of them.

    None for a language that is none of `tags`, its tokens. A code that stands among them is taken as it is.
    """
    found = language(word)
    names = [word.strip()]
    if found is not None:
        names += [found.iso, found.flores.partition("_")[0], found.flores, _TATOEBA.get(found.iso, found.iso)]
    return next((token for token in (f">>{name}<<" for name in names) if token in tags), None)
