#include "planner/binpack.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace megabagel::planner {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // so that no sum of a few token counts overflows

int64_t first_that_fits(const std::vector<int64_t>& waiting, int64_t room) {
  const auto found = std::find_if(waiting.begin(), waiting.end(), [&](int64_t length) { return length <= room; });
  return found == waiting.end() ? -1 : found - waiting.begin();
}

// Sums below `size` that a set of samples can have, one bit each.
class Sums {
 public:
  explicit Sums(int64_t size) : words_(static_cast<size_t>(size + 63) / 64, 0) { words_[0] = 1; }

  bool has(int64_t sum) const { return words_[static_cast<size_t>(sum) / 64] >> (sum % 64) & 1; }

  // The sums with one more sample that may be in or out.
  Sums with(int64_t length) const {
    Sums more(*this);
    const size_t skip = static_cast<size_t>(length) / 64, n = words_.size();
    const int shift = static_cast<int>(length % 64);
    for (size_t i = skip; i < n; ++i) more.words_[i] |= words_[i - skip] << shift;
    if (shift == 0) return more;
    for (size_t i = skip + 1; i < n; ++i) more.words_[i] |= words_[i - skip - 1] >> (64 - shift);
    return more;
  }

 private:
  std::vector<uint64_t> words_;
};

// The oldest sample of the waiting samples that fill `room` best together, or -1 when none fits.
int64_t of_best_subset(const std::vector<int64_t>& waiting, int64_t room) {
  int64_t best = 0;  // no subset that fits has more tokens than all samples that fit
  for (const int64_t length : waiting) best += length <= room ? std::min(length, room - best) : 0;
  std::vector<Sums> of_rest{Sums(best + 1)};  // element k: of the k youngest that fit
  std::vector<int64_t> fitting;               // youngest first
  for (size_t i = waiting.size(); i-- > 0;) {
    if (waiting[i] > best) continue;
    fitting.push_back(static_cast<int64_t>(i));
    of_rest.push_back(of_rest.back().with(waiting[i]));
  }
  while (!of_rest.back().has(best)) --best;
  for (size_t k = fitting.size(); k-- > 0;) {
    const int64_t left = best - waiting[static_cast<size_t>(fitting[k])];
    if (left >= 0 && of_rest[k].has(left)) return fitting[k];
  }
  return -1;
}

int64_t decide_greedy(const Limits& limits, int64_t fill, const std::vector<int64_t>& waiting, bool can_draw) {
  if (fill >= limits.expected_num_tokens) return kClose;
  const bool overfull = static_cast<int64_t>(waiting.size()) > limits.max_buffer_size;
  if (overfull || !can_draw || fill < limits.prefer_buffer_before) {
    const int64_t found = first_that_fits(waiting, limits.max_num_tokens - fill);
    if (found >= 0) return found;
  }
  return (overfull && fill) || !can_draw ? kClose : kDraw;
}

int64_t decide_best_fit(const Limits& limits, int64_t fill, const std::vector<int64_t>& waiting, bool can_draw) {
  const int64_t wanted = std::max<int64_t>(limits.max_buffer_size, 1);
  if (can_draw && static_cast<int64_t>(waiting.size()) < wanted) return kDraw;
  if (fill == 0) return waiting.empty() ? kClose : 0;  // so no sample waits for more packs than there are before it
  const int64_t found = of_best_subset(waiting, limits.max_num_tokens - fill);
  return found >= 0 ? found : kClose;
}

// The flow of samples of binpack.py over a sequence that ends.
class Player {
 public:
  Player(Strategy strategy, const Limits& limits, const std::vector<int64_t>& lengths,
         const std::vector<int64_t>& groups, const std::vector<int64_t>& mandatory)
      : strategy_(strategy), limits_(limits), lengths_(lengths), groups_(groups), mandatory_(mandatory),
        pack_of_(lengths.size(), -1), drawn_(lengths.size(), false) {
    for (size_t i = lengths.size(); i-- > 0;) of_group_[groups[i]].push_back(static_cast<int64_t>(i));
  }

  std::vector<int64_t> play() {
    for (;;) {
      if (mandatory_is_due()) {
        serve_mandatory();
        continue;
      }
      skip_drawn();
      const bool can_draw = next_ < lengths_.size();
      const int64_t choice = decide(strategy_, limits_, fill_, waiting_lengths_, can_draw);
      if (choice >= 0) {
        take_waiting(static_cast<size_t>(choice));
      } else if (choice == kDraw) {
        draw(static_cast<int64_t>(next_));
      } else {
        if (fill_ == 0) return pack_of_;
        close();
      }
    }
  }

 private:
  bool mandatory_is_due() const {
    return num_mandatory_done_ < mandatory_.size() && (strategy_ == Strategy::kGreedy || fill_ > 0);
  }

  void serve_mandatory() {
    const int64_t group = mandatory_[num_mandatory_done_++];
    if (strategy_ == Strategy::kGreedy) {
      for (size_t i = 0; i < waiting_.size(); ++i) {
        if (groups_[waiting_[i]] != group) continue;
        if (fits(lengths_[waiting_[i]])) return take_waiting(i);
        const int64_t sample = remove_waiting(i);
        return wait(sample);  // behind the others
      }
      return fetch(group);
    }
    if (std::find(open_groups_.begin(), open_groups_.end(), group) != open_groups_.end()) return;
    bool waits = false;
    for (size_t i = 0; i < waiting_.size(); ++i) {
      if (groups_[waiting_[i]] != group) continue;
      if (fits(lengths_[waiting_[i]])) return take_waiting(i);
      waits = true;
    }
    if (!waits) fetch(group);
  }

  void fetch(int64_t group) {
    std::vector<int64_t>& left = of_group_[group];  // last one first
    while (!left.empty() && drawn_[left.back()]) left.pop_back();
    if (left.empty()) return;
    const int64_t sample = left.back();
    drawn_[sample] = true;
    fits(lengths_[sample]) ? put(sample) : wait(sample);
  }

  void draw(int64_t sample) {
    drawn_[sample] = true;
    if (strategy_ == Strategy::kGreedy && fits(lengths_[sample])) return put(sample);
    wait(sample);
    const bool overfull = static_cast<int64_t>(waiting_.size()) > limits_.max_buffer_size;
    if (strategy_ == Strategy::kGreedy && overfull) close();
  }

  bool fits(int64_t length) const { return fill_ + length <= limits_.max_num_tokens; }

  void put(int64_t sample) {
    pack_of_[sample] = pack_;
    fill_ += lengths_[sample];
    open_groups_.push_back(groups_[sample]);
  }

  void wait(int64_t sample) {
    waiting_.push_back(sample);
    waiting_lengths_.push_back(lengths_[sample]);
  }

  int64_t remove_waiting(size_t i) {
    const int64_t sample = waiting_[i];
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    waiting_lengths_.erase(waiting_lengths_.begin() + static_cast<std::ptrdiff_t>(i));
    return sample;
  }

  void take_waiting(size_t i) { put(remove_waiting(i)); }

  void close() {
    ++pack_;
    fill_ = 0;
    num_mandatory_done_ = 0;
    open_groups_.clear();
  }

  void skip_drawn() {
    while (next_ < lengths_.size() && drawn_[next_]) ++next_;
  }

  const Strategy strategy_;
  const Limits& limits_;
  const std::vector<int64_t>&lengths_, &groups_, &mandatory_;
  std::vector<int64_t> pack_of_;
  std::vector<bool> drawn_;
  std::unordered_map<int64_t, std::vector<int64_t>> of_group_;
  std::vector<int64_t> waiting_, waiting_lengths_, open_groups_;
  size_t next_ = 0, num_mandatory_done_ = 0;
  int64_t pack_ = 0, fill_ = 0;
};

}  // namespace

int64_t decide(Strategy strategy, const Limits& limits, int64_t fill, const std::vector<int64_t>& waiting,
               bool can_draw) {
  if (fill < 0 || fill > limits.max_num_tokens) {
    throw std::invalid_argument("the open pack holds " + std::to_string(fill) + " tokens, but that must lie in 0 .. " +
                                std::to_string(limits.max_num_tokens));
  }
  for (const int64_t length : waiting) {
    if (length < 1) throw std::invalid_argument("a waiting sample has " + std::to_string(length) + " tokens");
  }
  return strategy == Strategy::kGreedy ? decide_greedy(limits, fill, waiting, can_draw)
                                       : decide_best_fit(limits, fill, waiting, can_draw);
}

std::vector<int64_t> pack_sequence(Strategy strategy, const Limits& limits, const std::vector<int64_t>& lengths,
                                   const std::vector<int64_t>& groups, const std::vector<int64_t>& mandatory) {
  if (limits.max_num_tokens > kMost) {
    throw std::invalid_argument("a pack may hold " + std::to_string(limits.max_num_tokens) +
                                " tokens, but no sequence has more than " + std::to_string(kMost));
  }
  if (limits.expected_num_tokens < 1 || limits.expected_num_tokens > limits.max_num_tokens) {
    throw std::invalid_argument("a pack is closed at " + std::to_string(limits.expected_num_tokens) +
                                " tokens, but that must lie in 1 .. " + std::to_string(limits.max_num_tokens));
  }
  if (groups.size() != lengths.size()) {
    throw std::invalid_argument(std::to_string(lengths.size()) + " lengths come with " +
                                std::to_string(groups.size()) + " groups, but every sample has one of each");
  }
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1 || lengths[i] > limits.max_num_tokens) {
      throw std::invalid_argument("sample " + std::to_string(i) + " has " + std::to_string(lengths[i]) +
                                  " tokens, but must have 1 .. " + std::to_string(limits.max_num_tokens));
    }
  }
  return Player(strategy, limits, lengths, groups, mandatory).play();
}

}  // namespace megabagel::planner
