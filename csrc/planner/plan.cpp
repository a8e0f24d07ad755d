#include "planner/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "planner/check.h"

namespace megabagel::planner {
namespace {

// Padded lengths of both streams: multiples of `tile`, each with at least one padding row.
void set_stream_lengths(const Sizes& sizes, int64_t tile, std::optional<int64_t> total_length, Plan* plan) {
  if (tile < 1 || tile > (int64_t{1} << 40)) {
    throw std::invalid_argument("the tile is " + std::to_string(tile) + ", but must be positive");
  }
  plan->und_length = (sizes.und / tile + 1) * tile;
  plan->gen_length = (sizes.gen / tile + 1) * tile;
  if (!total_length) return;
  if (*total_length % tile) {
    throw std::invalid_argument("the fixed pack length " + std::to_string(*total_length) + " must be a multiple of " +
                                std::to_string(tile) + " (tensor x context parallel size x 16)");
  }
  if (plan->und_length + plan->gen_length > *total_length) {
    throw std::invalid_argument("a pack of " + std::to_string(sizes.und) + " text and ViT tokens and " +
                                std::to_string(sizes.gen) + " latent tokens pads to " +
                                std::to_string(plan->und_length + plan->gen_length) +
                                " rows, more than the fixed length " + std::to_string(*total_length) +
                                "; raise data.max_num_tokens");
  }
  plan->und_length = *total_length - plan->gen_length;
}

// Position-table entries of an image in reading order.
void push_grid(const Input& input, const Piece& p, int64_t side, Column<int64_t>* out) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t row = (p.row_table < 0 ? r : input.buckets[p.row_table + r]) * side;
    if (p.column_table < 0) {
      out->count_up(row, p.columns);
      continue;
    }
    for (int64_t c = 0; c < p.columns; ++c) out->push(row + input.buckets[p.column_table + c]);
  }
}

// Writes the tables that belong to single tokens, piece by piece.
class TokenWriter {
 public:
  TokenWriter(const Input& input, const Geometry& geometry, Plan* plan)
      : input_(input), geometry_(geometry), plan_(*plan), next_text_id_(input.text_ids) {}

  void write(int64_t number) {
    const Piece& p = input_.pieces[number];
    if (p.kind == kText) {
      write_text(p);
    } else {
      write_image(p, input_.timesteps[number]);
    }
    if (p.closing_loss) {
      plan_.ce_rows.push(plan_.und_index.filled - 1);
      plan_.ce_labels.push(p.closing_label);
      plan_.ce_weights.push(1.0f);
    }
    position_ += p.length;
  }

 private:
  void write_text(const Piece& p) {
    const int64_t row = plan_.und_index.filled, body = p.length - 2;
    plan_.position_ids.count_up(p.rope_start, p.length);
    plan_.und_index.count_up(position_, p.length);
    plan_.text_rows.count_up(row, p.length);
    plan_.text_ids.push(geometry_.bos);
    plan_.text_ids.copy(next_text_id_, body);
    plan_.text_ids.push(geometry_.eos);
    if (p.loss) {  // every token but the end predicts the next one
      plan_.ce_rows.count_up(row, body + 1);
      plan_.ce_labels.copy(next_text_id_, body);
      plan_.ce_labels.push(geometry_.eos);
      plan_.ce_weights.repeat(static_cast<float>(1.0 / std::sqrt(static_cast<double>(body + 1))), body + 1);
    }
    next_text_id_ += body;
  }

  void write_image(const Piece& p, float timestep) {
    const int64_t body = p.length - 2;
    plan_.position_ids.repeat(p.rope_start, p.length);
    push_frame_token(geometry_.start_of_image, position_);
    if (p.kind == kVit) {
      plan_.vit_rows.count_up(plan_.und_index.filled, body);
      plan_.und_index.count_up(position_ + 1, body);
      plan_.vit_seqlens.push(body);
      push_grid(input_, p, geometry_.vit_side, &plan_.vit_position_ids);
    } else {
      if (p.loss) plan_.mse_rows.count_up(plan_.gen_index.filled, body);
      plan_.gen_index.count_up(position_ + 1, body);
      plan_.timesteps.repeat(timestep, body);
      plan_.latent_grids.push(p.rows);
      plan_.latent_grids.push(p.columns);
      push_grid(input_, p, geometry_.latent_side, &plan_.latent_position_ids);
    }
    push_frame_token(geometry_.end_of_image, position_ + 1 + body);
  }

  void push_frame_token(int64_t id, int64_t position) {
    plan_.text_ids.push(id);
    plan_.text_rows.push(plan_.und_index.filled);
    plan_.und_index.push(position);
  }

  const Input& input_;
  const Geometry& geometry_;
  Plan& plan_;
  const int64_t* next_text_id_;
  int64_t position_ = 0;  // in the sequence
};

// Writes splits, the attention order and its problems. In that order the noised tokens lie behind all others.
class AttentionWriter {
 public:
  AttentionWriter(const Input& input, int64_t num_shared, Plan* plan)
      : input_(input), plan_(*plan), next_noised_(num_shared) {}

  void write(int64_t number) {
    const Piece& p = input_.pieces[number];
    const bool starts_sample = position_ == sample_end_;
    if (starts_sample) {
      sample_end_ += input_.sample_lens[sample_++];
      sample_prefix_ = next_shared_;
    }
    if (p.starts_split) start_split(p.mode, starts_sample);
    plan_.split_lens.data[plan_.split_lens.filled - 1] += p.length;
    plan_.problems.data[plan_.problems.filled - 4] += p.length;  // the second of the last five entries
    int64_t& row = mode_ == kNoise ? next_noised_ : next_shared_;
    int64_t* order = plan_.attention_index.data.get() + row;
    for (int64_t i = 0; i < p.length; ++i) order[i] = position_ + i;
    row += p.length;
    position_ += p.length;
  }

 private:
  void start_split(int64_t mode, bool starts_sample) {
    const bool continues = mode == kCausal && mode_ == kCausal && !starts_sample;
    mode_ = mode;
    plan_.split_lens.push(0);
    plan_.split_modes.push(mode);
    if (continues) return;  // neighbouring texts see what one would: they are one problem
    plan_.problems.push(mode == kNoise ? next_noised_ : next_shared_);
    plan_.problems.push(0);
    plan_.problems.push(sample_prefix_);
    plan_.problems.push(next_shared_ - sample_prefix_);
    plan_.problems.push(mode == kCausal);
  }

  const Input& input_;
  Plan& plan_;
  int64_t next_shared_ = 0, next_noised_;   // rows of the attention order
  int64_t sample_ = 0, sample_end_ = 0;     // the next sample, and where the present one ends
  int64_t sample_prefix_ = 0;               // row of its first token that is not noised
  int64_t position_ = 0, mode_ = kFull;
};

}  // namespace

Plan::Plan(const Sizes& sizes)
    : und_index(sizes.und),
      gen_index(sizes.gen),
      position_ids(sizes.length),
      text_ids(sizes.text),
      text_rows(sizes.text),
      vit_rows(sizes.vit),
      vit_position_ids(sizes.vit),
      vit_seqlens(sizes.vit_images),
      latent_position_ids(sizes.gen),
      latent_grids(sizes.vae_images, 2),
      timesteps(sizes.gen),
      ce_rows(sizes.ce),
      ce_labels(sizes.ce),
      ce_weights(sizes.ce),
      mse_rows(sizes.mse),
      split_lens(sizes.splits),
      split_modes(sizes.splits),
      attention_index(sizes.length),
      problems(sizes.problems, 5) {}

Plan build_plan(const Input& input, const Geometry& geometry, int64_t tile, std::optional<int64_t> total_length) {
  const int64_t most_side = int64_t{1} << 20;
  if (std::min(geometry.vit_side, geometry.latent_side) < 1 ||
      std::max(geometry.vit_side, geometry.latent_side) > most_side) {
    throw std::invalid_argument("sides of position tables must lie in 1 .. " + std::to_string(most_side) + "");
  }
  const Sizes sizes = check_and_count(input);
  Plan plan(sizes);
  set_stream_lengths(sizes, tile, total_length, &plan);
  TokenWriter tokens(input, geometry, &plan);
  AttentionWriter attention(input, sizes.shared, &plan);
  for (int64_t i = 0; i < input.num_pieces; ++i) {
    tokens.write(i);
    attention.write(i);
  }
  return plan;
}

}  // namespace megabagel::planner
