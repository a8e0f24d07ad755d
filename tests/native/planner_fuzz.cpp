// Runs the planner and the packer on random input, well-formed and broken, and checks what comes out. For sanitizers:
//   planner_fuzz SEED RUNS            exit status 0 when all is well
//   planner_fuzz SEED RUNS --planted  reads behind a table on purpose, to show that the sanitizer sees such a thing
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "planner/binpack.h"
#include "planner/plan.h"

using namespace megabagel::planner;

namespace {

std::mt19937_64 random_bits;

int64_t draw(int64_t low, int64_t high) {  // both included
  return low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1));
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "planner_fuzz: %s\n", what);
  std::exit(2);
}

struct Pack {
  std::vector<Piece> pieces;
  std::vector<float> timesteps;
  std::vector<int64_t> text_ids, sample_lens, buckets;

  Input input() const {
    return {pieces.data(), static_cast<int64_t>(pieces.size()), timesteps.data(),
            text_ids.data(), static_cast<int64_t>(text_ids.size()), sample_lens.data(),
            static_cast<int64_t>(sample_lens.size()), buckets.data(), static_cast<int64_t>(buckets.size())};
  }
};

Piece random_piece(bool first, Pack* pack) {
  Piece p{};
  p.kind = draw(kText, kVae);
  p.rope_start = draw(0, 1000);
  p.starts_split = first || draw(0, 3) > 0;
  p.mode = p.kind == kText ? kCausal : draw(kFull, kNoise);
  p.loss = draw(0, 1);
  p.row_table = p.column_table = -1;
  p.closing_loss = draw(0, 4) == 0;
  p.closing_label = draw(0, 100);
  if (p.kind == kText) {
    const int64_t body = draw(0, 3) ? draw(0, 12) : 0;
    for (int64_t i = 0; i < body; ++i) pack->text_ids.push_back(draw(10, 99));
    p.length = body + 2;
    return p;
  }
  p.rows = draw(1, 6);
  p.columns = draw(1, 6);
  p.length = p.rows * p.columns + 2;
  if (draw(0, 1)) {
    p.row_table = static_cast<int64_t>(pack->buckets.size());
    for (int64_t i = 0; i < p.rows; ++i) pack->buckets.push_back(draw(0, 7));
    p.column_table = static_cast<int64_t>(pack->buckets.size());
    for (int64_t i = 0; i < p.columns; ++i) pack->buckets.push_back(draw(0, 7));
  }
  return p;
}

Pack random_pack() {
  Pack pack;
  for (int64_t samples = draw(1, 4); samples > 0; --samples) {
    int64_t length = 0;
    const int64_t pieces = draw(1, 6);
    for (int64_t i = 0; i < pieces; ++i) {
      pack.pieces.push_back(random_piece(i == 0, &pack));
      pack.timesteps.push_back(0.5f);
      length += pack.pieces.back().length;
    }
    pack.sample_lens.push_back(length);
  }
  return pack;
}

// Anything may be wrong with one number, up to the ends of int64.
void break_somewhere(Pack* pack) {
  const int64_t wrong[] = {-1, 0, 1, 2, 3, draw(-50, 50), INT64_MAX, INT64_MIN, INT64_MAX - 1, int64_t{1} << 41};
  const int64_t value = wrong[draw(0, 9)];
  const auto spoil = [&](int64_t* values, size_t count) {
    if (count) values[draw(0, static_cast<int64_t>(count) - 1)] = value;
  };
  const int64_t where = draw(0, 9);
  if (where < 6) {
    spoil(reinterpret_cast<int64_t*>(pack->pieces.data()), pack->pieces.size() * sizeof(Piece) / sizeof(int64_t));
  } else if (where < 8) {
    spoil(pack->sample_lens.data(), pack->sample_lens.size());
  } else if (where == 8) {
    spoil(pack->buckets.data(), pack->buckets.size());
  } else if (!pack->text_ids.empty()) {
    pack->text_ids.pop_back();
  }
}

template <typename T>
void require_range(const Column<T>& column, T low, T high, const char* what) {
  require(column.filled == column.size || column.filled == 0, what);
  for (int64_t i = 0; i < column.size; ++i) require(column.data[i] >= low && column.data[i] <= high, what);
}

void check_plan(const Plan& plan, int64_t length, bool well_formed) {
  require(plan.und_index.size + plan.gen_index.size == length, "every token is in one stream");
  require(plan.und_length > plan.und_index.size && plan.gen_length > plan.gen_index.size, "streams have padding");
  require_range<int64_t>(plan.und_index, 0, length - 1, "und_index");
  require_range<int64_t>(plan.gen_index, 0, length - 1, "gen_index");
  require_range<int64_t>(plan.text_rows, 0, plan.und_index.size - 1, "text_rows");
  require_range<int64_t>(plan.vit_rows, 0, plan.und_index.size - 1, "vit_rows");
  require_range<int64_t>(plan.ce_rows, 0, plan.und_index.size - 1, "ce_rows");
  require_range<int64_t>(plan.mse_rows, 0, plan.gen_index.size - 1, "mse_rows");
  require_range<float>(plan.ce_weights, 0.0f, 1.0f, "ce_weights");
  require_range<int64_t>(plan.split_modes, kCausal, kNoise, "split_modes");
  require(plan.position_ids.filled == length && plan.timesteps.filled == plan.gen_index.size, "tables are full");
  std::vector<bool> seen(static_cast<size_t>(length), false);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t position = plan.attention_index.data[i];
    require(position >= 0 && position < length && !seen[static_cast<size_t>(position)], "an order of all positions");
    seen[static_cast<size_t>(position)] = true;
  }
  int64_t queries = 0;
  for (int64_t i = 0; i < plan.problems.size; i += 5) {
    const int64_t* p = plan.problems.data.get() + i;
    require(p[0] >= 0 && p[1] > 0 && p[0] + p[1] <= length, "queries are rows");
    require(p[2] >= 0 && p[3] >= 0 && p[2] + p[3] <= length, "keys are rows");
    queries += p[1];
  }
  require(queries == length, "every token asks once");
  if (!well_formed) return;
  require_range<int64_t>(plan.text_ids, 1, 99, "text_ids");
  require_range<int64_t>(plan.position_ids, 0, 1100, "position_ids");
  require_range<int64_t>(plan.vit_position_ids, 0, 63, "vit_position_ids");
  require_range<int64_t>(plan.latent_position_ids, 0, 63, "latent_position_ids");
  require_range<int64_t>(plan.ce_labels, 0, 100, "ce_labels");
}

void fuzz_plan(bool broken) {
  Pack pack = random_pack();
  if (broken) break_somewhere(&pack);
  const Geometry geometry{1, 2, 3, 4, 8, 8};
  try {
    const Plan plan = build_plan(pack.input(), geometry, 16, std::nullopt);
    int64_t length = 0;
    for (const int64_t sample : pack.sample_lens) length += sample;
    check_plan(plan, length, !broken);
  } catch (const std::invalid_argument& error) {
    require(broken && std::strlen(error.what()) > 10, "only broken input is refused, with a sentence");
  }
}

void fuzz_packs() {
  const int64_t most = draw(1, 100);
  const Limits limits{draw(1, most), most, draw(0, most), draw(0, 8)};
  std::vector<int64_t> lengths, groups, mandatory;
  for (int64_t count = draw(0, 60); count > 0; --count) {
    lengths.push_back(draw(1, most));
    groups.push_back(draw(0, 3));
  }
  for (int64_t group = 0; group < 5; ++group) {
    if (draw(0, 2) == 0) mandatory.push_back(group);
  }
  const Strategy strategy = draw(0, 1) ? Strategy::kGreedy : Strategy::kBestFit;
  const std::vector<int64_t> pack_of = pack_sequence(strategy, limits, lengths, groups, mandatory);
  std::vector<int64_t> fill(lengths.size() + 1, 0);
  for (size_t i = 0; i < lengths.size(); ++i) {
    require(pack_of[i] >= 0 && pack_of[i] < static_cast<int64_t>(lengths.size()), "every sample is in a pack");
    fill[static_cast<size_t>(pack_of[i])] += lengths[i];
  }
  for (const int64_t tokens : fill) require(tokens <= most, "no pack holds too much");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 1;
  random_bits.seed(std::strtoull(argv[1], nullptr, 10));
  for (long run = std::strtol(argv[2], nullptr, 10); run > 0; --run) {
    fuzz_plan(false);
    fuzz_plan(true);
    fuzz_packs();
  }
  if (argc > 3 && std::strcmp(argv[3], "--planted") == 0) {
    const Column<int64_t> column(draw(1, 3));
    return static_cast<int>(column.data[column.size] & 1);
  }
  return 0;
}
