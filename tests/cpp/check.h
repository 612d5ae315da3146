// The smallest test harness: CHECK prints what failed, failures() is main's exit code.
#pragma once

#include <exception>
#include <functional>
#include <iostream>
#include <string>

inline int& failure_count() {
  static int count = 0;
  return count;
}

inline void report(bool ok, const char* what, const char* file, int line) {
  if (ok) return;
  if (++failure_count() <= 20) std::cerr << file << ":" << line << ": " << what << "\n";
}

inline int failures() {
  std::cout << (failure_count() == 0 ? "ok" : "FAILED") << "\n";
  return failure_count() == 0 ? 0 : 1;
}

// What it throws, or nothing.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

#define CHECK(cond) report((cond), #cond, __FILE__, __LINE__)
#define CHECK_EQ(a, b) report((a) == (b), #a " == " #b, __FILE__, __LINE__)
