--- Weighted round robin.
--
-- Equal weights: one after the other. Else a cursor that advances by the golden ratio over the
-- line of cumulated weights, which lie in the records: each peer gets its share, well spread, with
-- no schedule to build and O(log n) per pick. Each worker starts at random, and the cursor goes on
-- over versions, so that no peer is favoured by many workers or many changes.

local random = math.random
local setmetatable = setmetatable

local GOLDEN = 0.6180339887498949

local _M = {}
local uniform = {}
local weighted = {}
uniform.__index = uniform
weighted.__index = weighted


function uniform:next()
    local cursor = self.cursor + 1
    if cursor >= self.count then
        cursor = 0
    end
    self.cursor = cursor
    return cursor
end


function weighted:next()
    local position = self.position + GOLDEN
    if position >= 1 then
        position = position - 1
    end
    self.position = position
    local target, peers = position * self.total, self.peers
    local low, high = 0, self.count - 1
    while low < high do
        local middle = (low + high - (low + high) % 2) / 2
        if peers[middle].cumulative > target then
            high = middle
        else
            low = middle + 1
        end
    end
    return low
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view, previous)
    local cursor = previous and previous.cursor or random(0, 65535)
    local position = previous and previous.position or random()
    return setmetatable({
        peers = view.peers,
        count = view.count,
        total = view.total_weight,
        cursor = view.count > 0 and cursor % view.count or 0,
        position = position,
    }, view.uniform and uniform or weighted)
end


return _M
