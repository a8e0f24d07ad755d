#include "planner/binpack.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace megabagel::planner {
namespace {

int64_t first_that_fits(const std::vector<int64_t>& waiting, int64_t room) {
  const auto found = std::find_if(waiting.begin(), waiting.end(), [&](int64_t length) { return length <= room; });
  return found == waiting.end() ? -1 : found - waiting.begin();
}

int64_t largest_that_fits(const std::vector<int64_t>& waiting, int64_t room) {
  int64_t best = -1, best_length = -1;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (waiting[i] <= room && waiting[i] > best_length) best = static_cast<int64_t>(i), best_length = waiting[i];
  }
  return best;
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
  const int64_t found = largest_that_fits(waiting, limits.max_num_tokens - fill);
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
    std::vector<int64_t> lengths(waiting_.size(), limits_.max_num_tokens + 1);
    bool waits = false;
    for (size_t i = 0; i < waiting_.size(); ++i) {
      if (groups_[waiting_[i]] != group) continue;
      lengths[i] = lengths_[waiting_[i]];
      waits = true;
    }
    const int64_t found = largest_that_fits(lengths, limits_.max_num_tokens - fill_);
    if (found >= 0) take_waiting(static_cast<size_t>(found));
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
  return strategy == Strategy::kGreedy ? decide_greedy(limits, fill, waiting, can_draw)
                                       : decide_best_fit(limits, fill, waiting, can_draw);
}

std::vector<int64_t> pack_sequence(Strategy strategy, const Limits& limits, const std::vector<int64_t>& lengths,
                                   const std::vector<int64_t>& groups, const std::vector<int64_t>& mandatory) {
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
