//! What comes along with weights besides numbers: the tokenizer's files, the chat template, the settings of generation. A checkpoint
//! keeps each as it came, under its own name, and an export writes it again.

use crate::checkpoint::stored::Stored;
use crate::error::{Error, IoContext, Result};
use crate::text::chat::{self, ChatTemplate, SPECIAL_TOKENS, SpecialTokens};
use crate::text::{self, AddedToken, StretchSpace, Tokenizer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::config::{self, TokenIds};

/// Where transformers 4 kept the chat template.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// What `generate` of transformers goes by.
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";
/// Which of the added tokens are special, in directories of transformers 4.
const SPECIAL_MAP: &str = "special_tokens_map.json";
/// Tokens behind those of a SentencePiece model, in directories of transformers 4.
const ADDED_TOKENS: &str = "added_tokens.json";
/// Under these keys, there and in [`TOKENIZER_CONFIG`], stand tokens or lists of them.
const SPECIAL_KEYS: [&str; 8] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token", "additional_special_tokens", "extra_special_tokens"];
/// Under this key stands the template in [`TOKENIZER_CONFIG`].
const CHAT_TEMPLATE: &str = "chat_template";
/// A larger file is none of these: the largest published tokenizer.json has 35 MB.
const MOST_BYTES: u64 = 256 << 20;

/// Files that are kept, beside the chat templates in a folder of their own. A tokenizer file that is the checkpoint's tokenizer is not
/// counted among them; config.json is kept for its ids, and written anew on export.
const COMPANIONS: [&str; 9] = [
    config::FILE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    text::JSON_FILE,
    SPECIAL_MAP,
    ADDED_TOKENS,
    "vocab.json",
    "merges.txt",
    chat::TEMPLATE_FILE,
];

/// Whether a file of this name is kept.
pub fn is_companion(name: &str) -> bool {
    COMPANIONS.contains(&name) || template_name(name).is_some()
}

/// The name of a chat template in the folder of those that are not the default.
fn template_name(file: &str) -> Option<&str> {
    let name = file.strip_prefix(chat::TEMPLATE_DIR)?.strip_prefix('/')?.strip_suffix(".jinja")?;
    Some(name).filter(|name| !name.is_empty() && !name.contains('/'))
}

/// The tokenizer of a directory, and what else is kept of it.
pub(super) struct Found {
    pub tokenizer: Option<Vec<u8>>,
    pub companions: BTreeMap<String, Vec<u8>>,
}

impl Found {
    /// Reads them. Err: a file that cannot be read, is too large, or ends in .json and is none.
    pub fn read(hf_dir: &Path) -> Result<Found> {
        let primary = text::TOKENIZER_FILES.into_iter().find(|name| hf_dir.join(name).is_file());
        let tokenizer = primary.map(|name| read(&hf_dir.join(name))).transpose()?;
        let mut companions = BTreeMap::new();
        for name in COMPANIONS.into_iter().filter(|name| Some(*name) != primary && hf_dir.join(name).is_file()) {
            companions.insert(name.to_string(), read(&hf_dir.join(name))?);
        }
        let folder = hf_dir.join(chat::TEMPLATE_DIR);
        for entry in folder.is_dir().then(|| fs::read_dir(&folder).at(&folder)).transpose()?.into_iter().flatten() {
            let path = entry.at(&folder)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).map(|name| format!("{}/{name}", chat::TEMPLATE_DIR));
            if let Some(name) = name.filter(|name| template_name(name).is_some() && path.is_file()) {
                companions.insert(name, read(&path)?);
            }
        }
        Ok(Found { tokenizer, companions })
    }

    /// Weights are of use without a tokenizer, and one of a sort that cannot be read here comes along all the same; but then there are no
    /// texts.
    pub fn tell_unreadable(&self, hf_dir: &Path) {
        let Some(bytes) = self.companions.get(text::JSON_FILE).or(self.tokenizer.as_ref()) else { return };
        if let Err(error) = Tokenizer::from_bytes(bytes.clone(), &hf_dir.join(text::file_name(bytes))) {
            log::warn!("the tokenizer comes along but cannot be used: {error}");
        }
    }

    /// An end of responses that the model cannot say is kept as it came, but then responses only end by their length.
    pub fn tell_ends_that_are_no_tokens(&self, hf_dir: &Path, vocab_size: usize) {
        let of = |name: &str| -> Value {
            let parsed = self.companions.get(name).and_then(|bytes| serde_json::from_slice(bytes).ok());
            parsed.map_or(Value::Null, |config: Value| config["eos_token_id"].clone())
        };
        let of_generation = of(GENERATION_CONFIG);
        let (name, eos) = if of_generation.is_null() { (config::FILE, of(config::FILE)) } else { (GENERATION_CONFIG, of_generation) };
        let is_token = |id: &Value| id.as_u64().is_some_and(|id| id < vocab_size as u64);
        for id in one_or_all(&eos).filter(|id| !id.is_null() && !is_token(id)) {
            let path = hf_dir.join(name);
            log::warn!("{}: eos_token_id {id} is no token id below {vocab_size}: no response will end by it", path.display());
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let n_bytes = fs::metadata(path).at(path)?.len();
    if n_bytes > MOST_BYTES {
        return Err(Error::file(path, format!("{n_bytes} bytes, expected at most {MOST_BYTES}")).remedy("download it again"));
    }
    let bytes = fs::read(path).at(path)?;
    if path.extension().is_some_and(|extension| extension == "json") {
        let parsed: serde_json::Result<serde::de::IgnoredAny> = serde_json::from_slice(&bytes);
        parsed.map_err(|error| Error::file(path, format!("not JSON: {error}")).remedy("download it again"))?;
    }
    Ok(bytes)
}

/// A companion that is JSON; null when there is none.
fn value(stored: &Stored, name: &str) -> Value {
    stored.meta().companions.get(name).map_or(Value::Null, |bytes| serde_json::from_slice(bytes).unwrap_or(Value::Null))
}

/// The templates by name, as transformers 5 writes them, in files of their own; where there is none, in tokenizer_config.json as earlier
/// ones did: one, or several with their names.
fn templates(stored: &Stored) -> BTreeMap<String, String> {
    let name_of = |file: &str| if file == chat::TEMPLATE_FILE { Some(chat::DEFAULT.into()) } else { template_name(file).map(String::from) };
    // From the last name on: a default in the folder counts before the one beside it.
    let files = stored.meta().companions.iter().rev();
    let of_files: BTreeMap<String, String> =
        files.filter_map(|(file, bytes)| Some((name_of(file)?, String::from_utf8_lossy(bytes).into_owned()))).collect();
    if !of_files.is_empty() {
        return of_files;
    }
    let named = |name: Option<&str>, text: &Value| Some((name?.to_string(), text.as_str()?.to_string()));
    match &value(stored, TOKENIZER_CONFIG)[CHAT_TEMPLATE] {
        Value::Array(several) => several.iter().filter_map(|one| named(one["name"].as_str(), &one["template"])).collect(),
        one => named(Some(chat::DEFAULT), one).into_iter().collect(),
    }
}

/// The tokenizer of a model's text: as in transformers its tokenizer.json where it has one, also beside a SentencePiece model, since only
/// that says what was added and how special tokens part a text; else the SentencePiece model with the tokens that other files add to it.
pub fn tokenizer(stored: &Stored) -> Result<Option<Tokenizer>> {
    if let Some(json) = stored.meta().companions.get(text::JSON_FILE) {
        return Tokenizer::from_bytes(json.clone(), &stored.dir().join(text::JSON_FILE)).map(Some);
    }
    let Some(tokenizer) = stored.tokenizer()? else { return Ok(None) };
    let added = added_tokens(stored, &tokenizer);
    Ok(Some(tokenizer.with_added(added, stretch_space(stored))))
}

/// Which of its tokenizers transformers 5 takes for a SentencePiece model, and how that parts text.
fn stretch_space(stored: &Stored) -> StretchSpace {
    let config = value(stored, TOKENIZER_CONFIG);
    let is_llama = value(stored, config::FILE)["model_type"] == "llama"
        && ["LlamaTokenizer", "LlamaTokenizerFast"].iter().any(|class| config["tokenizer_class"] == *class);
    match config.get("legacy") {
        _ if is_llama && config["add_prefix_space"] == false => StretchSpace::None,
        // Which a tokenizer of any class is made by.
        Some(legacy) if *legacy != true => StretchSpace::First,
        Some(_) if is_llama => StretchSpace::Each,
        None if is_llama => StretchSpace::First,
        _ => StretchSpace::OfModel,
    }
}

/// What a directory adds to a SentencePiece model: the table in tokenizer_config.json, or, as earlier versions wrote it, a file of its
/// own, with the special ones in another; and pieces that it calls special.
fn added_tokens(stored: &Stored, tokenizer: &Tokenizer) -> Vec<AddedToken> {
    let config = value(stored, TOKENIZER_CONFIG);
    let map = value(stored, SPECIAL_MAP);
    let special: Vec<&Value> = SPECIAL_KEYS.iter().flat_map(|key| [&config[*key], &map[*key]]).flat_map(one_or_all).collect();
    let token = |text: &str, id: u64, flags: &Value, is_special: bool| {
        let takes_space = ["lstrip", "rstrip"].map(|side| flags[side] == true);
        Some(AddedToken { text: text.into(), id: u32::try_from(id).ok()?, is_special, takes_space })
    };
    let named = |text: &str| special.iter().find(|one| text_of(one) == Some(text)).copied();
    let called = special.iter().filter_map(|one| token(text_of(one)?, tokenizer.id_of(text_of(one)?)?.into(), one, true));
    let added: Vec<AddedToken> = match config["added_tokens_decoder"].as_object() {
        Some(table) => {
            let of_table = |(id, one): (&String, &Value)| token(text_of(one)?, id.parse().ok()?, one, one["special"] == true);
            table.iter().filter_map(of_table).collect()
        }
        None => {
            let file = value(stored, ADDED_TOKENS);
            let of_file =
                |(text, id): (&String, &Value)| token(text, id.as_u64()?, named(text).unwrap_or(&Value::Null), named(text).is_some());
            file.as_object().into_iter().flatten().filter_map(of_file).collect()
        }
    };
    called.chain(added).collect()
}

/// A list's values, or the one.
fn one_or_all(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice).iter()
}

/// A token written as a text, or as an object with it.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or(token["content"].as_str())
}

/// The ids that the model came with; else those of its tokenizer; else none.
pub(super) fn token_ids(stored: &Stored) -> Result<TokenIds> {
    let came_with = value(stored, config::FILE);
    if came_with.is_object() {
        let id = |key: &str| came_with[key].clone();
        return Ok(TokenIds { bos: id("bos_token_id"), eos: id("eos_token_id"), pad: id("pad_token_id") });
    }
    let Some(tokenizer) = tokenizer(stored)? else { return Ok(TokenIds::default()) };
    Ok(TokenIds { bos: json!(tokenizer.bos_id()), eos: json!(tokenizer.eos_id()), pad: json!(tokenizer.pad_id()) })
}

/// The token that begins a text, by the config.json that the model came with, else by its tokenizer; none when nobody knows.
pub fn bos_id(stored: &Stored) -> Result<Option<u32>> {
    match token_ids(stored)?.bos.as_u64().map(u32::try_from) {
        Some(Ok(id)) => Ok(Some(id)),
        _ => Ok(tokenizer(stored)?.and_then(|tokenizer| tokenizer.bos_id())),
    }
}

/// Whether transformers puts this token before every text of the model: when its tokenizer.json asks for it, or, where there is none, when
/// its tokenizer_config.json does.
pub fn adds_first(stored: &Stored, id: u32) -> Result<bool> {
    let companion = stored.meta().companions.get(text::JSON_FILE);
    let json = companion.or(stored.meta().tokenizer.as_ref()).filter(|bytes| text::file_name(bytes) == text::JSON_FILE);
    match json {
        Some(bytes) => Ok(Tokenizer::from_bytes(bytes.clone(), &stored.dir().join(text::JSON_FILE))?.first_added() == Some(id)),
        None => Ok(value(stored, TOKENIZER_CONFIG)["add_bos_token"] == true),
    }
}

/// The tokens that end what the model says: as transformers has it, by the generation_config.json that it came with, else by its
/// config.json, else by its tokenizer; none when nobody knows.
pub fn eos_ids(stored: &Stored) -> Result<Vec<u32>> {
    let of_generation = value(stored, GENERATION_CONFIG)["eos_token_id"].clone();
    let eos = if of_generation.is_null() { token_ids(stored)?.eos } else { of_generation };
    let ids = eos.as_array().cloned().unwrap_or_else(|| vec![eos]);
    Ok(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect())
}

/// How conversations become text: the templates that came with the model, or Nemotron's where the tokenizer has its pieces; else none.
pub fn chat_template(stored: &Stored, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let texts = templates(stored);
    if texts.is_empty() {
        return Ok(tokenizer.id_of(chat::NEMOTRON_TURN).map(|_| ChatTemplate::nemotron()));
    }
    let ids = token_ids(stored)?;
    let files = [value(stored, TOKENIZER_CONFIG), value(stored, SPECIAL_MAP)];
    // By name, a text or an object with it, null for a token that there is not; else the model's id, of several the first.
    let by_id = |id: &Value| id.as_u64().or(id[0].as_u64()).and_then(|id| tokenizer.piece_text(id as u32));
    let token = |key: &'static str| {
        let text = match files.iter().find_map(|file| file.get(key)) {
            Some(named) => text_of(named).map(String::from),
            None => match key {
                "bos_token" => by_id(&ids.bos),
                "eos_token" => by_id(&ids.eos),
                "pad_token" => by_id(&ids.pad),
                "unk_token" => by_id(&json!(tokenizer.unk_id())),
                _ => None,
            },
        };
        Some((key, text?))
    };
    let special: SpecialTokens = SPECIAL_TOKENS.into_iter().filter_map(token).collect();
    Ok(Some(ChatTemplate::several(texts.iter().map(|(name, text)| (name.as_str(), text.as_str())), special)))
}

/// The files of an export besides config.json and weights: the tokenizer, and what came along; a generation_config.json is made when
/// none did.
pub(super) fn of_export(stored: &Stored, ids: &TokenIds) -> BTreeMap<String, Vec<u8>> {
    let mut files = stored.meta().companions.clone();
    files.remove(config::FILE);
    files.entry(GENERATION_CONFIG.into()).or_insert_with(|| {
        let made = json!({"_from_model_config": true, "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad});
        serde_json::to_vec_pretty(&made).expect("plain data")
    });
    if let Some(tokenizer) = &stored.meta().tokenizer {
        files.insert(text::file_name(tokenizer).into(), tokenizer.clone());
    }
    files
}
