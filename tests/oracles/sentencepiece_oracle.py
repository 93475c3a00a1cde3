"""The reference side of tests/tokenizer.rs: Google's sentencepiece, asked through standard input and output.

    sentencepiece_oracle.py train PREFIX CORPUS KEY=VALUE..   trains PREFIX.model with SentencePiece's own trainer
    sentencepiece_oracle.py encode MODEL     a line of hex bytes in -> a line of ids out
    sentencepiece_oracle.py decode MODEL     a line of ids in -> a line of hex bytes (UTF-8) out
    sentencepiece_oracle.py pieces MODEL     a line per piece: hex text, score, type number
    sentencepiece_oracle.py special MODEL    unk bos eos pad vocab_size
    sentencepiece_oracle.py spec MODEL       the trainer and normaliser spec, field by field

Needs: pip install sentencepiece==0.2.* protobuf
"""
import sys

import sentencepiece as spm


def train(prefix, corpus, settings):
    options = dict(
        input=corpus, model_prefix=prefix, model_type="bpe", byte_fallback=True, split_digits=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity", character_coverage=0.9995, num_threads=1,
        max_sentence_length=1 << 20, minloglevel=2)
    for setting in settings:
        key, value = setting.split("=", 1)
        if value in ("true", "false"):
            options[key] = value == "true"
        elif key == "user_defined_symbols":
            options[key] = value.split("|")
        elif key == "character_coverage":
            options[key] = float(value)
        elif value.lstrip("-").isdigit():
            options[key] = int(value)
        else:
            options[key] = value
    spm.SentencePieceTrainer.train(**options)


def main():
    command, model = sys.argv[1], sys.argv[2]
    if command == "train":
        return train(model, sys.argv[3], sys.argv[4:])
    processor = spm.SentencePieceProcessor(model_file=model)
    out = []
    if command == "encode":
        for line in sys.stdin:
            out.append(" ".join(map(str, processor.encode(bytes.fromhex(line.strip()), out_type=int))))
    elif command == "decode":
        for line in sys.stdin:
            out.append(processor.decode([int(word) for word in line.split()]).encode("utf-8").hex())
    elif command == "pieces":
        from sentencepiece import sentencepiece_model_pb2 as pb
        proto = pb.ModelProto()
        proto.ParseFromString(open(model, "rb").read())
        for piece in proto.pieces:
            out.append(f"{piece.piece.encode('utf-8').hex()} {piece.score!r} {piece.type}")
    elif command == "special":
        p = processor
        out.append(f"{p.unk_id()} {p.bos_id()} {p.eos_id()} {p.pad_id()} {p.vocab_size()}")
    elif command == "spec":
        from sentencepiece import sentencepiece_model_pb2 as pb
        proto = pb.ModelProto()
        proto.ParseFromString(open(model, "rb").read())
        for spec in (proto.trainer_spec, proto.normalizer_spec):
            for field, value in spec.ListFields():
                out.append(f"{field.name}={value!r}")
    else:
        sys.exit(f"unknown command {command}")
    sys.stdout.write("".join(line + "\n" for line in out))


main()
