//! The SentencePiece tokenizer: a BPE `.model`, ready to encode and decode with SentencePiece's own ids.

use super::Special;
use super::added::{AddedToken, Cut, Named, StretchSpace};
use super::decode::{Decoder, Decoding};
use super::encode::{self, Scratch};
use super::model_file::{ModelFile, Piece, PieceKind, TrainerSpec};
use super::tables::{SPACE_MARK, Tables};
use crate::error::Result;
use std::path::Path;
use std::sync::Mutex;

/// A SentencePiece BPE model; threads share it.
pub struct SentencePiece {
    pieces: Vec<Piece>,
    tables: Tables,
    decoder: Decoder,
    special: Special,
    named: Named,
    space: StretchSpace,
    /// The model asks for a space before a text.
    dummy_prefix: bool,
    /// Workspaces of the encoder that no call uses just now.
    idle: Mutex<Vec<Scratch>>,
}

impl SentencePiece {
    /// From the bytes of a `.model`; `origin` is named in errors: not a SentencePiece model, damaged, or of a sort that is not
    /// supported (unigram, normalisation other than identity, ..).
    pub fn from_bytes(bytes: &[u8], origin: &Path) -> Result<SentencePiece> {
        let model = ModelFile::parse(origin, bytes)?;
        let pieces = model.checked_pieces(origin)?;
        let dummy_prefix = model.normalizer.add_dummy_prefix.unwrap_or(true);
        let unk_surface = model.trainer.unk_surface.clone().unwrap_or_else(|| " \u{2047} ".into());
        let decoder = Decoder { unk_surface, dummy_prefix };
        let special = special_ids(&model.trainer, &pieces);
        let (tables, space) = (Tables::new(&pieces), StretchSpace::OfModel);
        let named = Named::new(&pieces, &named_kinds(space), Vec::new());
        Ok(SentencePiece { pieces, tables, decoder, special, named, space, dummy_prefix, idle: Mutex::new(Vec::new()) })
    }

    /// With the tokens of a directory, and how stretches of text between named tokens begin.
    pub(super) fn with_added(self, added: Vec<AddedToken>, space: StretchSpace) -> SentencePiece {
        let dummy_prefix = match space {
            StretchSpace::OfModel => self.dummy_prefix,
            StretchSpace::First | StretchSpace::Each => true,
            StretchSpace::None => false,
        };
        let decoder = Decoder { dummy_prefix, ..self.decoder };
        SentencePiece { named: Named::new(&self.pieces, &named_kinds(space), added), decoder, space, ..self }
    }

    /// The ids, and how many pairs of symbols were looked at: the work done, free of clocks. O(n log n) for any text; a
    /// text met before may cost less.
    pub fn encode_counting(&self, text: &str) -> (Vec<u32>, u64) {
        let mut ids = Vec::new();
        let operations = self.encode_with(text, &mut ids);
        (ids, operations)
    }

    /// Appends the ids of a text in which tokens stand by their names.
    pub(super) fn encode_named(&self, text: &str, ids: &mut Vec<u32>) {
        for (i, cut) in self.named.cut(text).into_iter().enumerate() {
            match cut {
                Cut::Token(id) => ids.push(id),
                Cut::Text(stretch) => {
                    let begins_with_space = stretch.starts_with([' ', SPACE_MARK]);
                    let takes_space = match self.space {
                        StretchSpace::OfModel => self.dummy_prefix,
                        StretchSpace::First => i == 0 && !begins_with_space,
                        StretchSpace::Each => !begins_with_space,
                        StretchSpace::None => false,
                    };
                    self.encode_stretch(stretch, takes_space, ids);
                }
            }
        }
    }

    /// Appends the ids of a text; the pairs of symbols looked at.
    pub(super) fn encode_with(&self, text: &str, ids: &mut Vec<u32>) -> u64 {
        self.encode_stretch(text, self.dummy_prefix, ids)
    }

    fn encode_stretch(&self, text: &str, takes_space: bool, ids: &mut Vec<u32>) -> u64 {
        if text.is_empty() {
            return 0;
        }
        let mut scratch = self.idle.lock().expect("no panic while held").pop().unwrap_or_else(Scratch::new);
        let before = scratch.operations;
        if takes_space {
            encode::encode(&self.tables, &format!(" {text}"), &mut scratch, ids);
        } else {
            encode::encode(&self.tables, text, &mut scratch, ids);
        }
        let operations = scratch.operations - before;
        self.idle.lock().expect("no panic while held").push(scratch);
        operations
    }

    /// The text of ids, as SentencePiece decodes it: control pieces vanish, bytes that are no character become U+FFFD each,
    /// unknown (and any id outside the vocabulary) becomes " \u{2047} ".
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decoder.decode(|id| self.piece_or_added(id), ids)
    }

    fn piece_or_added(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(id as usize).or_else(|| self.named.added(id))
    }

    /// Takes the next id of a decoding.
    pub(super) fn decode_next(&self, decoding: &mut Decoding, id: u32) {
        decoding.push(&self.decoder, self.piece_or_added(id));
    }

    /// Number of pieces.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The piece of an id as the model has it: U+2581 for a space, `<0x0A>` for a byte.
    ///
    /// # Panics
    /// When `id` is not below [`SentencePiece::vocab_size`].
    pub fn piece(&self, id: u32) -> &str {
        &self.pieces[id as usize].text
    }

    /// What the piece of an id is; panics like [`SentencePiece::piece`].
    pub fn kind(&self, id: u32) -> PieceKind {
        self.pieces[id as usize].kind
    }

    /// The id of a piece by its text in the model, or of an added token.
    pub fn id_of(&self, piece: &str) -> Option<u32> {
        let place = self.pieces.iter().position(|found| found.text == piece);
        place.map(|id| id as u32).or_else(|| self.named.added_id(piece))
    }

    /// The text of a piece or of an added token; None for an id that is neither.
    pub(super) fn text_of(&self, id: u32) -> Option<&str> {
        self.piece_or_added(id).map(|piece| piece.text.as_str())
    }

    /// Ids with a meaning of their own.
    pub(super) fn special(&self) -> Special {
        self.special
    }
}

/// Which pieces a text may name.
fn named_kinds(space: StretchSpace) -> Vec<PieceKind> {
    let mut kinds = vec![PieceKind::Control, PieceKind::Unknown];
    if space != StretchSpace::OfModel {
        kinds.push(PieceKind::UserDefined);
    }
    kinds
}

/// The special ids as SentencePiece finds them: by the piece's name in the trainer spec, and only when it is a control
/// piece (or, for unknown, the unknown piece).
fn special_ids(spec: &TrainerSpec, pieces: &[Piece]) -> Special {
    let find = |name: &Option<String>, default: &str, kind: PieceKind| {
        let name = name.as_deref().filter(|name| !name.is_empty()).unwrap_or(default);
        pieces.iter().position(|piece| piece.text == name && piece.kind == kind).map(|id| id as u32)
    };
    Special {
        unk: pieces.iter().position(|piece| piece.kind == PieceKind::Unknown).map(|id| id as u32),
        bos: find(&spec.bos_piece, "<s>", PieceKind::Control),
        eos: find(&spec.eos_piece, "</s>", PieceKind::Control),
        pad: find(&spec.pad_piece, "<pad>", PieceKind::Control),
    }
}
