--- Of two peers at random, by weight, the one whose requests in flight times its mean latency are
-- less.
--
-- Two are enough to keep away from slow ones, and few enough that not all workers run to the
-- fastest one. Those that are about as good share alike: of two, the one would get everything else
-- for a difference that nobody notices. Where the latency of one of them is not known yet, the
-- requests in flight alone decide.

local load = require "tidegate.load"
local weights = require "tidegate.pickers.weights"

local at = weights.at
local latency = load.latency
local random = math.random
local setmetatable = setmetatable
local sum = load.sum

local TRIES = 16
local NOTICED = 1.25        -- times as good as the other one
local FLOOR = 0.002         -- seconds: what lies below is as much the clock's as the peer's

local _M = {}
local class = {}
class.__index = class


local function better(view, one, other)
    local first, second = view.peers[one].cell, view.peers[other].cell
    local a, b = sum(first) + 1, sum(second) + 1
    local its, others = latency(first), latency(second)
    if its > 0 and others > 0 then
        a, b = a * (its + FLOOR), b * (others + FLOOR)
    end
    return b * NOTICED < a and other or one
end


-- Another one than `index`: with the same chances for equal weights, else nearly.
local function draw_other(view, index)
    local count = view.count
    if view.uniform then
        local other = view.first + random(0, count - 2)
        return other >= index and other + 1 or other
    end
    for _ = 1, 4 do
        local other = at(view, random())
        if other ~= index then
            return other
        end
    end
    return index
end


function class:next()
    local view = self.view
    local index = at(view, random())
    return view.count > 1 and better(view, index, draw_other(view, index)) or index
end


function class:search(ok, context)
    local view = self.view
    local found
    for _ = 1, TRIES do
        local index = at(view, random())
        if index ~= found and ok(context, index) then
            if found then
                return better(view, found, index)
            end
            found = index
        end
    end
    return found or weights.search(self, ok, context)
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view)
    return setmetatable({ view = view }, class)
end


return _M
