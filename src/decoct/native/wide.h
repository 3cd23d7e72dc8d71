// Vectors of two halves, for levels whose registers hold less than sixteen lanes: GCC takes a vector that is wider than a register
// apart in memory, at ten times the price. Operators do what the compiler's own do, half by half.
#pragma once

#include <type_traits>
#include <utility>

namespace decoct {
namespace DECOCT_LEVEL {

template <class V>
struct Pair {
  V low, high;
  // The same bits as other numbers.
  template <class U>
  DECOCT_INLINE explicit operator Pair<U>() const { return {(U)low, (U)high}; }
};

template <class V>
struct Lane {
  typedef std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>> type;
};
template <class V>
struct Lane<Pair<V>> : Lane<V> {};

#define DECOCT_HALF_BY_HALF(op)                                                                       \
  template <class V>                                                                                  \
  DECOCT_INLINE auto operator op(const Pair<V>& a, const Pair<V>& b)->Pair<decltype(a.low op b.low)> { \
    return {a.low op b.low, a.high op b.high};                                                        \
  }                                                                                                   \
  template <class V>                                                                                  \
  DECOCT_INLINE auto operator op(const Pair<V>& a, typename Lane<V>::type b)->Pair<decltype(a.low op b)> { \
    return {a.low op b, a.high op b};                                                                 \
  }                                                                                                   \
  template <class V>                                                                                  \
  DECOCT_INLINE auto operator op(typename Lane<V>::type a, const Pair<V>& b)->Pair<decltype(a op b.low)> { \
    return {a op b.low, a op b.high};                                                                 \
  }
DECOCT_HALF_BY_HALF(+)
DECOCT_HALF_BY_HALF(-)
DECOCT_HALF_BY_HALF(*)
DECOCT_HALF_BY_HALF(/)
DECOCT_HALF_BY_HALF(&)
DECOCT_HALF_BY_HALF(|)
DECOCT_HALF_BY_HALF(<<)
DECOCT_HALF_BY_HALF(>>)
DECOCT_HALF_BY_HALF(<)
DECOCT_HALF_BY_HALF(>)
DECOCT_HALF_BY_HALF(>=)
DECOCT_HALF_BY_HALF(==)
#undef DECOCT_HALF_BY_HALF

template <class V>
DECOCT_INLINE Pair<V> operator-(const Pair<V>& a) { return {-a.low, -a.high}; }
template <class V>
DECOCT_INLINE Pair<V> operator~(const Pair<V>& a) { return {~a.low, ~a.high}; }
template <class V, class B>
DECOCT_INLINE Pair<V>& operator+=(Pair<V>& a, const B& b) { return a = a + b; }
template <class V, class B>
DECOCT_INLINE Pair<V>& operator-=(Pair<V>& a, const B& b) { return a = a - b; }

template <class V>
struct IsPair : std::false_type {};
template <class V>
struct IsPair<Pair<V>> : std::true_type {};

}  // namespace DECOCT_LEVEL
}  // namespace decoct
