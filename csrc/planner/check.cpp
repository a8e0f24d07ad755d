#include "planner/check.h"

#include <stdexcept>
#include <string>

namespace megabagel::planner {
namespace {

// Far above any pack, low enough that no sum or product of checked values overflows.
constexpr int64_t kMost = int64_t{1} << 40;
constexpr int64_t kLargestBucket = int64_t{1} << 20;

[[noreturn]] void refuse(int64_t piece, const std::string& what) {
  throw std::invalid_argument("piece " + std::to_string(piece) + " of the pack " + what);
}

void check_table(const Input& input, int64_t number, const char* axis, int64_t table, int64_t count) {
  if (table == -1) return;
  if (table < 0 || count > input.num_buckets - table) {
    refuse(number, std::string("takes the positions of its ") + axis + " from entry " + std::to_string(table) +
                       " on, but the tables hold " + std::to_string(input.num_buckets) + " entries");
  }
}

void check_piece(const Input& input, int64_t number) {
  const Piece& p = input.pieces[number];
  if (p.kind < kText || p.kind > kVae || p.mode < kCausal || p.mode > kNoise) {
    refuse(number, "has kind " + std::to_string(p.kind) + " and mode " + std::to_string(p.mode) +
                       ", but both must be 0, 1 or 2");
  }
  if (p.length < 2 || p.length > kMost) {
    refuse(number, "has " + std::to_string(p.length) + " tokens, but must have 2 (its start and its end) or more");
  }
  if (p.rope_start < -kMost || p.rope_start > kMost) {
    refuse(number, "starts at RoPE id " + std::to_string(p.rope_start) + ", which no sequence reaches");
  }
  if (p.kind == kText) return;
  const int64_t body = p.length - 2;
  if (p.rows < 1 || p.columns < 1 || body / p.columns != p.rows || body % p.columns) {
    refuse(number, "is an image of " + std::to_string(p.rows) + " x " + std::to_string(p.columns) +
                       " tokens, but has " + std::to_string(body) + " between its start and its end");
  }
  check_table(input, number, "rows", p.row_table, p.rows);
  check_table(input, number, "columns", p.column_table, p.columns);
}

void check_buckets(const Input& input) {
  for (int64_t i = 0; i < input.num_buckets; ++i) {
    if (input.buckets[i] < 0 || input.buckets[i] >= kLargestBucket) {
      throw std::invalid_argument("entry " + std::to_string(i) + " of the position tables is " +
                                  std::to_string(input.buckets[i]) + ", but must lie in 0 .. " +
                                  std::to_string(kLargestBucket - 1));
    }
  }
}

void count_piece(const Piece& p, Sizes* sizes) {
  const int64_t body = p.length - 2;
  sizes->length += p.length;
  sizes->text += p.kind == kText ? p.length : 2;
  sizes->ce += p.closing_loss != 0;
  if (p.kind == kText) {
    sizes->ce += p.loss ? p.length - 1 : 0;
  } else if (p.kind == kVit) {
    sizes->vit += body;
    ++sizes->vit_images;
  } else {
    sizes->gen += body;
    sizes->mse += p.loss ? body : 0;
    ++sizes->vae_images;
  }
}

}  // namespace

Sizes check_and_count(const Input& input) {
  if (input.num_samples == 0) throw std::invalid_argument("a pack needs at least one sample");
  check_buckets(input);
  Sizes sizes;
  int64_t sample = -1, sample_end = 0, text_ids = 0, split_mode = kFull;
  for (int64_t i = 0; i < input.num_pieces; ++i) {
    check_piece(input, i);
    const Piece& p = input.pieces[i];
    const bool starts_sample = sizes.length == sample_end;
    if (starts_sample) {
      if (++sample == input.num_samples) refuse(i, "belongs to no sample");
      if (input.sample_lens[sample] < 2 || input.sample_lens[sample] > kMost) {
        throw std::invalid_argument("sample " + std::to_string(sample) + " of the pack has " +
                                    std::to_string(input.sample_lens[sample]) + " tokens, but must have at least 2");
      }
      sample_end += input.sample_lens[sample];
    }
    if (p.starts_split) {
      const bool continues = p.mode == kCausal && split_mode == kCausal && !starts_sample;
      ++sizes.splits;
      sizes.problems += !continues;
      split_mode = p.mode;
    } else if (starts_sample) {
      refuse(i, "continues a split, but is the first of its sample");
    }
    count_piece(p, &sizes);
    sizes.shared += split_mode == kNoise ? 0 : p.length;
    text_ids += p.kind == kText ? p.length - 2 : 0;
    if (sizes.length > sample_end) refuse(i, "reaches beyond the end of its sample");
    if (sizes.length > kMost) refuse(i, "makes the pack longer than any sequence");
  }
  if (sample + 1 != input.num_samples || sizes.length != sample_end) {
    throw std::invalid_argument("the samples of the pack hold more tokens than their pieces");
  }
  if (text_ids != input.num_text_ids) {
    throw std::invalid_argument("the texts of the pack have " + std::to_string(text_ids) + " tokens, but " +
                                std::to_string(input.num_text_ids) + " token ids are given");
  }
  sizes.und = sizes.text + sizes.vit;
  return sizes;
}

}  // namespace megabagel::planner
