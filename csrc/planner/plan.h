// The layout of one packed sequence: from items of samples to every table of megabagel/packing/plan.py, where the
// tables are explained. C++17 alone: it knows neither Python nor torch, and checks what it is given.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

namespace megabagel::planner {

enum Kind : int64_t { kText, kVit, kVae };
enum Mode : int64_t { kCausal, kFull, kNoise };

// One item: start token, body, end token. Python passes an int64 table with these columns.
struct Piece {
  int64_t kind;
  int64_t length;  // start and end included
  int64_t rope_start;
  int64_t starts_split;  // flags are 0 or 1
  int64_t mode;
  int64_t loss;
  int64_t rows;  // images: the grid, in tokens
  int64_t columns;
  int64_t row_table;  // where in `buckets` the position of each row is; -1: row i has position i
  int64_t column_table;
  int64_t closing_loss;  // whether the end token is a loss row, and its label
  int64_t closing_label;
};

struct Input {
  const Piece* pieces;
  int64_t num_pieces;
  const float* timesteps;  // [num_pieces], used for VAE images
  const int64_t* text_ids;  // of all texts one after the other, without start and end
  int64_t num_text_ids;
  const int64_t* sample_lens;
  int64_t num_samples;
  const int64_t* buckets;
  int64_t num_buckets;
};

struct Geometry {
  int64_t bos, eos, start_of_image, end_of_image;
  int64_t vit_side, latent_side;  // of the position tables
};

// One table of the plan, filled from front to back. Its memory is not initialised first.
template <typename T>
struct Column {
  explicit Column(int64_t rows, int64_t width = 1)
      : size(rows * width), width(width), data(new T[static_cast<size_t>(rows * width)]) {}

  void push(T value) { data[filled++] = value; }
  void repeat(T value, int64_t count) {
    T* out = data.get() + filled;
    for (int64_t i = 0; i < count; ++i) out[i] = value;
    filled += count;
  }
  void count_up(T first, int64_t count) {
    T* out = data.get() + filled;
    for (int64_t i = 0; i < count; ++i) out[i] = first + i;
    filled += count;
  }
  void copy(const T* values, int64_t count) {
    T* out = data.get() + filled;
    for (int64_t i = 0; i < count; ++i) out[i] = values[i];
    filled += count;
  }

  int64_t size, width, filled = 0;
  std::unique_ptr<T[]> data;
};

// Row counts of the tables.
struct Sizes {
  int64_t length = 0, und = 0, gen = 0, text = 0, vit = 0, vit_images = 0, vae_images = 0, ce = 0, mse = 0;
  int64_t splits = 0, problems = 0;
  int64_t shared = 0;  // tokens that are not noised
};

struct Plan {
  explicit Plan(const Sizes& sizes);

  int64_t und_length = 0, gen_length = 0;
  Column<int64_t> und_index, gen_index, position_ids, text_ids, text_rows, vit_rows, vit_position_ids, vit_seqlens,
      latent_position_ids, latent_grids;
  Column<float> timesteps;
  Column<int64_t> ce_rows, ce_labels;
  Column<float> ce_weights;
  Column<int64_t> mse_rows, split_lens, split_modes, attention_index, problems;
};

// The plan of the pieces in their order; O(tokens) time and memory. With `total_length` the und stream takes what the
// gen stream leaves of it. Throws std::invalid_argument with one sentence for input that makes no plan.
Plan build_plan(const Input& input, const Geometry& geometry, int64_t tile, std::optional<int64_t> total_length);

// Calls f(name, column) for every table.
template <typename F>
void for_each_column(Plan& plan, F&& f) {
  f("und_index", plan.und_index);
  f("gen_index", plan.gen_index);
  f("position_ids", plan.position_ids);
  f("text_ids", plan.text_ids);
  f("text_rows", plan.text_rows);
  f("vit_rows", plan.vit_rows);
  f("vit_position_ids", plan.vit_position_ids);
  f("vit_seqlens", plan.vit_seqlens);
  f("latent_position_ids", plan.latent_position_ids);
  f("latent_grids", plan.latent_grids);
  f("timesteps", plan.timesteps);
  f("ce_rows", plan.ce_rows);
  f("ce_labels", plan.ce_labels);
  f("ce_weights", plan.ce_weights);
  f("mse_rows", plan.mse_rows);
  f("split_lens", plan.split_lens);
  f("split_modes", plan.split_modes);
  f("attention_index", plan.attention_index);
  f("problems", plan.problems);
}

}  // namespace megabagel::planner
